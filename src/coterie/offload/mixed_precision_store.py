"""The expert store with two precisions: promoted experts in high precision, others in low."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import Tensor

from coterie.offload.cached_store import CachedExpertStore, LayerCache
from coterie.offload.eviction import FloatArray, Lru, Mask
from coterie.offload.precision_stats import PrecisionErrors, PrecisionStats, vote_shares
from coterie.offload.slot_table import EMPTY, Slots
from coterie.offload.traffic_log import TrafficLog
from coterie.values import ExpertRequest, Slab

SHARE_TOLERANCE = 1e-12  # rounding of a sum of shares, which depends on the order of the terms


@dataclass  # not frozen: its caches change with every forward
class MixedPrecisionStore:
    """Two cached stores of one model: ``high`` for promoted experts, ``low`` for all others.

    Before a forward, the top-voted experts that together hold ``vote_mass`` of its votes are
    promoted to high precision. After it, at most ``max_promotions`` of the experts served in low
    precision are promoted; the layer's next forward waits for them. The high-precision cache evicts
    an expert only for one with a higher score. So results depend on earlier requests and never on
    timing. With both parameters 0, the high-precision experts never change.
    """

    high: CachedExpertStore
    low: CachedExpertStore
    max_promotions: int = 0  # per layer, after each forward
    vote_mass: float = 0.0
    errors: Mapping[int, PrecisionErrors] = field(default_factory=dict)  # by layer, where known
    format_names: tuple[str, str] = ("high", "low")
    precision_stats: PrecisionStats = field(init=False)
    traffic_log: TrafficLog = field(init=False)  # vanilla: high precision in the same total memory

    def __post_init__(self) -> None:
        high, low = self.high, self.low
        layer_bytes = high.capacity * high.expert_bytes + low.capacity * low.expert_bytes
        equal_slots = layer_bytes // high.expert_bytes
        self.traffic_log = TrafficLog(
            high.expert_bytes,
            lambda layer: Slots(low.experts, equal_slots, Lru(), high.warm_votes.get(layer)),
            lambda: high.fetcher.stall_seconds + low.fetcher.stall_seconds,
        )
        self.precision_stats = PrecisionStats(
            *self.format_names, high.capacity, low.capacity, self.errors
        )
        for store, name in zip((high, low), self.format_names, strict=True):
            store.log_transfer = partial(self._log_transfer, name, store.expert_bytes)

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        cache = self.high.ready_cache(layer)
        used, votes = request.used.cpu().numpy(), request_votes(request)
        resident_before = cache.slots.resident
        cache.slots.record_access(used, votes)
        top_mask = top_by_mass(votes, used, self.vote_mass)
        self._promote(layer, cache, top_mask & ~resident_before, len(used))
        high_mask = used & cache.slots.resident
        low_mask = used & ~high_mask
        low_resident = self.low.layer_cache(layer).slots.resident
        hits = np.count_nonzero(high_mask & resident_before | low_mask & low_resident)
        self.traffic_log.log_layer(layer, request, used=int(np.count_nonzero(used)), hits=int(hits))
        self.precision_stats.record(layer, votes, high_mask, low_mask)
        high_slabs = self._high_slabs(layer) if high_mask.any() else iter(())
        if low_mask.any():
            # While cached experts are computed, the others are fetched.
            if not (low_resident & low_mask).any():
                yield from high_slabs
            yield from self._low_slabs(layer, request, low_mask, high_slabs)
        yield from high_slabs
        self._promote(layer, cache, low_mask, self.max_promotions)

    def resident(self, layer: int) -> Tensor | None:
        """[E] bool: experts cached in either precision, which no forward waits for."""
        low, high = self.low.resident(layer), self.high.resident(layer)
        return None if low is None or high is None else low | high

    @property
    def capacity(self) -> int:
        """Slots per layer of both precisions; an expert may have one in each."""
        return self.high.capacity + self.low.capacity

    def reset(self) -> None:
        """Empty both caches once no fetch is in flight, and reload the warm-start experts."""
        self.traffic_log.log_reset()
        self.high.reset()
        self.low.reset()

    def fill(self, layers: Sequence[int]) -> None:
        """Load the warm-start experts of both precisions before the first forward."""
        for layer in layers:
            self.low.layer_cache(layer)
            self.high.layer_cache(layer)

    def _promote(self, layer: int, cache: LayerCache, candidates: Mask, limit: int) -> None:
        """Start to fetch these experts in high precision, as far as their scores allow."""
        with self.high.rollback_on_error(layer, cache):
            loads = cache.slots.promote(candidates, limit)
            if loads:
                cache.invalidate()
            self.precision_stats.promotions += len(loads)
            self.high.fetch(layer, cache, loads)

    def _low_slabs(
        self, layer: int, request: ExpertRequest, low_mask: Mask, high_slabs: Iterator[Slab]
    ) -> Iterator[Slab]:
        """The low-precision slabs, and the high-precision one after the first of them."""
        requested = self.high.fetcher.to_device(low_mask)
        for slab in self.low.serve(layer, replace(request, used=requested)):
            # The slab may hold more experts than requested: each expert must be computed once.
            yield replace(slab, slot_of=slab.slot_of.where(requested, EMPTY))
            yield from high_slabs

    def _high_slabs(self, layer: int) -> Iterator[Slab]:
        yield from self.high.resident_slabs(self.high.ready_cache(layer))

    def _log_transfer(self, format_name: str, expert_bytes: int, tier: str) -> None:
        self.traffic_log.log_transfer(f"{tier}, {format_name}", total_bytes=expert_bytes)


def top_by_mass(votes: FloatArray, used: Mask, mass: float) -> Mask:
    """[E]: the fewest used experts that hold this share of the votes, top-voted first."""
    share = vote_shares(votes, used)
    order = np.argsort(-share, kind="stable")
    mass_before = np.cumsum(share[order]) - share[order]
    selected_mask = np.zeros_like(used)
    selected_mask[order[mass_before < mass - SHARE_TOLERANCE]] = True
    return selected_mask & used


def request_votes(request: ExpertRequest) -> FloatArray:
    """[E] votes of a request; without votes, 1 for each used expert."""
    votes = request.votes
    return (request.used.double() if votes is None else votes).cpu().numpy()
