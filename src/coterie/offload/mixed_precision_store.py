"""The store with two precisions: finer experts where they are, coarse ones where they are not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from coterie.offload.cached_store import (
    CachedExpertStore,
    SlabFactory,
    SlotAllocator,
    allocate_slots,
)
from coterie.offload.eviction import ByVotes, Eviction, FloatArray, Lru, Mask
from coterie.offload.fetchers import ExpertFetcher
from coterie.offload.high_precision_slots import HighPrecisionSlots
from coterie.offload.slot_table import EMPTY, Slots
from coterie.offload.traffic import Transfer
from coterie.offload.traffic_log import TrafficLog
from coterie.values import ExpertRequest, Slab

SHARE_TOLERANCE = 1e-12  # of a share: what adding in another order may change


@dataclass(frozen=True)
class PrecisionErrors:
    """Relative errors of a layer's experts, [E] each: of what they give for Gaussian input."""

    high: FloatArray
    low: FloatArray


@dataclass  # not frozen: it keeps book
class PrecisionStats:
    """In which precision votes were served; sums over layers and forwards.

    The loss bound of a forward's layer is the sum over used experts of vote share x relative error
    of the precision in which the expert was served: what errors come to that all point one way. The
    squares of errors in place of errors tell what they come to where each points its own way. Both
    stay 0 without ``errors``.
    """

    forwards: int = 0  # of a layer
    high_share_sum: float = 0.0  # vote shares
    bound_sum: float = 0.0
    square_sum: float = 0.0
    promotions: int = 0

    @property
    def high_precision_share(self) -> float:
        """Share of the votes that was served fine; of a layer and forward, on average."""
        return self.high_share_sum / max(1, self.forwards)

    @property
    def loss_bound(self) -> float:
        """Of a layer and forward, on average."""
        return self.bound_sum / max(1, self.forwards)

    @property
    def loss_rms(self) -> float:
        """The root of the mean square: near the relative error of a layer's output."""
        return math.sqrt(self.square_sum / max(1, self.forwards))

    def record(
        self, votes: FloatArray, high_mask: Mask, low_mask: Mask, errors: PrecisionErrors | None
    ) -> None:
        """One forward of a layer; who is in neither mask was not used."""
        share = vote_shares(votes, high_mask | low_mask)
        self.forwards += 1
        self.high_share_sum += float(share[high_mask].sum())
        if errors is not None:
            error = np.where(high_mask, errors.high, errors.low)
            self.bound_sum += float((share * error).sum())
            self.square_sum += float((share * error**2).sum())


def vote_shares(votes: FloatArray, used: Mask) -> FloatArray:
    """Of the votes [E] for those used, the part of each; equal parts where they have none."""
    used_votes = np.where(used, votes, 0.0)
    total = used_votes.sum()
    return used_votes / total if total > 0 else used / max(1, int(np.count_nonzero(used)))


@dataclass(frozen=True)
class HighPrecisionSource:
    """Where finer experts come from and how they are shown: slots for ``capacity`` of each
    layer."""

    fetcher: ExpertFetcher
    make_slab: SlabFactory
    allocate: SlotAllocator
    expert_bytes: int
    capacity: int


@dataclass(frozen=True)
class HighPrecisionLayer:
    """A layer's finer experts: the book, their bytes, and who is on the way."""

    slots: HighPrecisionSlots
    memory: Tensor  # [capacity, bytes of an expert] uint8
    fetches: list[Future[str]] = field(default_factory=list)


@dataclass  # not frozen: it holds what changes with every forward
class MixedPrecisionStore:
    """Slots with experts in a finer precision beside a store that has all of them coarse.

    The most voted experts that together hold ``mass`` of a forward's votes become fine before they
    serve it, where others that are fine are worth less. Of the coarse that served, ``upgrades`` at
    most become fine afterwards: from the next forward of their layer on, which waits for them. So
    what is computed follows from what was asked for before, and from nothing that a clock decides.
    With neither, who is fine never changes.
    """

    high_precision: HighPrecisionSource
    low_precision: CachedExpertStore
    max_promotions: int = 0  # begun after a forward of a layer, at most
    vote_mass: float = 0.0  # share of a forward's votes whose experts are fine at once
    eviction: Eviction = field(default_factory=ByVotes)
    warm_votes: Mapping[int, FloatArray] = field(
        default_factory=dict
    )  # by layer, votes of earlier runs
    errors: Mapping[int, PrecisionErrors] = field(
        default_factory=dict
    )  # by layer, where they are known
    format_names: tuple[str, str] = ("fine", "coarse")  # what both are called
    precision_stats: PrecisionStats = field(default_factory=PrecisionStats)
    traffic_log: TrafficLog = field(
        init=False
    )  # of both; "vanilla" is one of fine experts in all memory
    _layers: dict[int, HighPrecisionLayer] = field(default_factory=dict)
    _memory: dict[int, Tensor] = field(default_factory=dict)  # outlives what a layer forgets
    _failed_layers: set[int] = field(default_factory=set)  # layers for which bringing failed
    _logged_transfers: dict[str, Transfer] = field(
        default_factory=dict
    )  # what came of the coarse, by its tier

    def __post_init__(self) -> None:
        high, low = self.high_precision, self.low_precision
        layer_bytes = high.capacity * high.expert_bytes + low.capacity * low.expert_bytes
        equal_slots = layer_bytes // high.expert_bytes
        self.traffic_log = TrafficLog(
            high.expert_bytes,
            lambda layer: Slots(low.experts, equal_slots, Lru(), self.warm_votes.get(layer)),
            lambda: self.stall_seconds,
        )

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        cache = self._wait(layer)
        used, votes, resident_before = (
            request.used.cpu().numpy(),
            request_votes(request),
            cache.slots.resident,
        )
        cache.slots.record_access(used, votes)
        self._promote(
            layer, cache, top_by_mass(votes, used, self.vote_mass) & ~resident_before, len(used)
        )
        high_mask = used & cache.slots.resident
        low_mask = used & ~high_mask
        self._log_layer(
            layer, request, resident_before=resident_before, high_mask=high_mask, low_mask=low_mask
        )
        self.precision_stats.record(votes, high_mask, low_mask, self.errors.get(layer))
        high_slabs = self._high_slabs(layer) if high_mask.any() else iter(())
        if low_mask.any():
            yield from self._both_precisions(layer, request, low_mask, high_slabs)
        yield from high_slabs
        self._log_low_precision()
        self._promote(layer, cache, low_mask, self.max_promotions)

    def resident(self, layer: int) -> Tensor | None:
        """Those too that are here coarse only: nobody waits for them either."""
        low = self.low_precision.resident(layer)
        high = self.high_precision.fetcher.to_device(self._layer(layer).slots.resident)
        return None if low is None else low | high

    def slots(self, layer: int) -> int | None:
        del layer
        return min(self.low_precision.experts, self.capacity)

    @property
    def capacity(self) -> int:
        """Slots of both precisions; an expert may stand in both."""
        return self.high_precision.capacity + self.low_precision.capacity

    def reset(self) -> None:
        """Forget who is here, once nobody is on the way; those of the start come back."""
        self.traffic_log.log_reset()
        for cache in self._layers.values():
            self.high_precision.fetcher.drain(cache.fetches)
            self._log_fetches(cache)
        layers = tuple(self._layers)
        self._layers.clear()
        self._failed_layers.clear()
        self.low_precision.reset()
        self.fill(layers)

    def fill(self, layers: Sequence[int]) -> None:
        """Those of the start are there, in both precisions, before any forward counts them."""
        for layer in layers:
            self.low_precision.resident(layer)
            self._layer(layer)
        for layer in layers:
            self._wait(layer)
        self._log_low_precision()

    @property
    def stall_seconds(self) -> float:
        """Seconds in which nothing was computed, for whichever precision."""
        return self.high_precision.fetcher.stall_seconds + self.low_precision.stall_seconds

    def _promote(self, layer: int, cache: HighPrecisionLayer, candidates: Mask, limit: int) -> None:
        """Begin to bring these, as far as others are worth less."""
        with self._rollback_on_error(layer, cache):
            loads = cache.slots.promote(candidates, limit)
            self.precision_stats.promotions += len(loads)
            self._fetch(layer, cache, loads)

    def _log_layer(
        self,
        layer: int,
        request: ExpertRequest,
        *,
        resident_before: Mask,
        high_mask: Mask,
        low_mask: Mask,
    ) -> None:
        """In the ledger; nobody waits for who is here in the precision that serves."""
        low_resident = self.low_precision.resident(layer)
        assert low_resident is not None
        hits = np.count_nonzero(high_mask & resident_before | low_mask & low_resident.cpu().numpy())
        used = np.count_nonzero(high_mask | low_mask)
        self.traffic_log.log_layer(layer, request, used=int(used), hits=int(hits))

    def _log_low_precision(self) -> None:
        """Which coarse experts came since this was last asked."""
        for tier, total in self.low_precision.traffic_log.traffic().transfers.items():
            transfer = total.plus(self._logged_transfers.get(tier, Transfer()), -1)
            self.traffic_log.log_transfer(
                f"{tier}, {self.format_names[1]}", transfer.experts, transfer.bytes
            )
            self._logged_transfers[tier] = total

    def _both_precisions(
        self, layer: int, request: ExpertRequest, low_mask: Mask, high_slabs: Iterator[Slab]
    ) -> Iterator[Slab]:
        """Coarse experts that are here go first where there are any: while they and the ``fine``
        ones are computed, the others come."""
        requested = self.high_precision.fetcher.to_device(low_mask)
        resident = self.low_precision.resident(layer)
        if resident is None or not bool((resident & requested).any()):
            yield from high_slabs
        for slab in self.low_precision.serve(layer, replace(request, used=requested)):
            # A coarse slab may hold more than was asked for: who is fine shall not count twice.
            yield replace(slab, slot_of=slab.slot_of.where(requested, EMPTY))
            yield from high_slabs

    def _high_slabs(self, layer: int) -> Iterator[Slab]:
        """All that are fine, once they are there; nothing that comes later overwrites them before
        they were computed with."""
        fetcher, cache = self.high_precision.fetcher, self._wait(layer)
        try:
            yield self.high_precision.make_slab(
                cache.memory, fetcher.to_device(cache.slots.slot_of)
            )
        finally:
            fetcher.mark_computed()

    def _wait(self, layer: int) -> HighPrecisionLayer:
        """The layer's shelf, once all that was begun for it is there."""
        cache = self._layer(layer)
        with self._rollback_on_error(layer, cache):
            self.high_precision.fetcher.wait(cache.fetches)
        self._log_fetches(cache)
        return cache

    def _log_fetches(self, cache: HighPrecisionLayer) -> None:
        """Those that have come."""
        for fetch in cache.fetches:
            if fetch.done() and fetch.exception() is None:
                self.traffic_log.log_transfer(f"{fetch.result()}, {self.format_names[0]}")
        cache.fetches.clear()

    @contextmanager
    def _rollback_on_error(self, layer: int, cache: HighPrecisionLayer) -> Iterator[None]:
        """Where this fails nobody is fine any more, once nothing is on its way: the book may tell
        of experts that never came."""
        try:
            yield
        except BaseException as error:
            # As in ``Offloaded``: no places are kept into which something may still come.
            memory = self._memory.pop(layer)
            self._layers.pop(layer, None)
            self._failed_layers.add(layer)
            self.high_precision.fetcher.drain(cache.fetches)
            if not isinstance(error, KeyboardInterrupt):
                self._memory[layer] = memory
            raise

    def _layer(self, layer: int) -> HighPrecisionLayer:
        if layer not in self._layers:
            source = self.high_precision
            # Only the first time: who cannot be read and is not needed is no reason to fail again.
            warm_votes = None if layer in self._failed_layers else self.warm_votes.get(layer)
            slots = HighPrecisionSlots(
                self.low_precision.experts, source.capacity, self.eviction, warm_votes
            )
            if layer not in self._memory:
                self._memory[layer] = allocate_slots(
                    source.allocate, slots.capacity, source.expert_bytes
                )
                source.fetcher.mark_computed()  # with what lay there before
            self._layers[layer] = cache = HighPrecisionLayer(slots, self._memory[layer])
            assigned = enumerate(slots.expert_of)
            with self._rollback_on_error(layer, cache):
                self._fetch(
                    layer, cache, [(expert, slot) for slot, expert in assigned if expert != EMPTY]
                )
        return self._layers[layer]

    def _fetch(
        self, layer: int, cache: HighPrecisionLayer, loads: Iterable[tuple[int, int]]
    ) -> None:
        for expert, slot in loads:
            cache.fetches.append(
                self.high_precision.fetcher.fetch_async(layer, expert, cache.memory[slot])
            )


def top_by_mass(votes: FloatArray, used: Mask, mass: float) -> Mask:
    """[E]: the fewest of those used that hold such a share of their votes, most voted first."""
    share = vote_shares(votes, used)
    order = np.argsort(-share, kind="stable")
    mass_before = np.cumsum(share[order]) - share[order]
    selected_mask = np.zeros_like(used)
    selected_mask[order[mass_before < mass - SHARE_TOLERANCE]] = True
    return selected_mask & used


def request_votes(request: ExpertRequest) -> FloatArray:
    """Votes [E] of a demand; one for each expert that is used where nobody said."""
    votes = request.votes
    return (request.used.double() if votes is None else votes).cpu().numpy()
