"""The store that keeps some experts of each layer and fetches the others, wave by wave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from coterie.errors import CoterieError
from coterie.offload.cpu_experts import CpuExperts, TokenCounts
from coterie.offload.eviction import Eviction, FloatArray, Lru, Mask, eviction_votes
from coterie.offload.fetchers import ExpertFetcher
from coterie.offload.slot_table import EMPTY, SlotIndices, Slots, Wave
from coterie.offload.traffic_log import TrafficLog
from coterie.values import ExpertRequest, Slab

SlabFactory = Callable[[Tensor, Tensor], Slab]
"""A slab over slots [n, bytes of an expert] uint8 and ``slot_of`` [E]."""

SlotAllocator = Callable[[int, int], Tensor]
"""Memory for (slots, bytes of an expert), uint8."""


@dataclass(frozen=True)
class LayerCache:
    """A layer's slots: the book of them, and their bytes."""

    slots: Slots
    memory: Tensor  # [capacity, bytes of an expert] uint8
    resident_slab: list[Slab] = field(
        default_factory=list
    )  # of everybody here, once it was asked for
    resident_mask: list[Tensor] = field(
        default_factory=list
    )  # [E] bool, who that is, once asked for

    def invalidate(self) -> None:
        """Others will be here."""
        self.resident_slab.clear()
        self.resident_mask.clear()


@dataclass  # not frozen: it holds what changes with every forward
class CachedExpertStore:
    """``capacity`` slots for the experts of each layer, and a courier to where they all are.

    Experts that are here are computed while the others come; a coreset larger than the slots comes
    in waves. Nothing that a slab was made of is overwritten before it was computed with, which is
    asked for by the time the next slab is. ``serve`` reads on the host who is used: on a GPU, the
    one time that it waits for computing. Where bringing fails, the layer forgets all that it held,
    and the error says which expert it was. A layer's slots are made, and filled with the best of
    ``warm``, when it is first asked what it holds.
    """

    fetcher: ExpertFetcher
    make_slab: SlabFactory
    allocate: SlotAllocator
    experts: int
    expert_bytes: int
    capacity: int
    eviction: Eviction = field(default_factory=Lru)
    warm_votes: Mapping[int, FloatArray] = field(
        default_factory=dict
    )  # votes [E] of earlier runs, by layer
    cpu_experts: CpuExperts | None = (
        None  # experts that do not come, for they are computed where they lie
    )
    traffic_log: TrafficLog = field(init=False)
    _layers: dict[int, LayerCache] = field(default_factory=dict)
    _memory: dict[int, Tensor] = field(default_factory=dict)  # outlives what a layer forgets
    _failed_layers: set[int] = field(default_factory=set)  # layers for which bringing failed

    def __post_init__(self) -> None:
        self.traffic_log = TrafficLog(
            self.expert_bytes,
            lambda layer: Slots(self.experts, self.capacity, Lru(), self.warm_votes.get(layer)),
            lambda: self.fetcher.stall_seconds,
        )

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        cache = self._layer(layer)
        used_mask, token_counts = self._used_and_tokens(request)
        # Where nobody ever leaves, no rule has a say.
        votes = eviction_votes(self.eviction, request) if self.capacity < self.experts else None
        if cache.slots.holds_all(used_mask):
            used = int(np.count_nonzero(used_mask))
            self.traffic_log.log_layer(layer, request, used=used, hits=used)
            if self.capacity < self.experts:
                cache.slots.record_access(used_mask, votes)
            yield from self._with_release(self._resident_slab(cache))
            return
        missed_mask = used_mask & ~cache.slots.resident
        cpu_mask = self._cpu_misses(missed_mask, token_counts)
        used, hits, on_cpu = (
            int(np.count_nonzero(expert_mask))
            for expert_mask in (used_mask, used_mask & ~missed_mask, cpu_mask)
        )
        self.traffic_log.log_layer(layer, request, used=used, hits=hits, on_cpu=on_cpu)
        slot_of = cache.slots.slot_of.copy()
        cache.invalidate()
        fetches: dict[int, Future[str]] = {}
        try:  # from before the book tells of experts that have yet to come
            waves = cache.slots.serve(used_mask & ~cpu_mask, votes)
            if on_cpu:  # first: what it computes with is there; copies are asked for before it is
                waves.insert(0, Wave(tuple(np.flatnonzero(cpu_mask).tolist())))
            yield from self._wave_slabs(layer, cache, waves, slot_of, fetches, on_cpu=on_cpu > 0)
        except BaseException as error:
            self._discard_layer(layer, fetches, error)
            raise

    def _wave_slabs(
        self,
        layer: int,
        cache: LayerCache,
        waves: Sequence[Wave],
        slot_of: SlotIndices,
        fetches: dict[int, Future[str]],
        *,
        on_cpu: bool,
    ) -> Iterator[Slab]:
        """A slab for each; the first one's lies outside the slots where it is computed aside."""
        for index, wave in enumerate(waves):
            self._fetch(layer, cache, wave.loads, fetches)
            if wave.loads:
                self._wait(fetches)
            slot_of = _slots_after(slot_of, wave.loads)
            self._fetch(layer, cache, _prefetchable_loads(waves[index:], slot_of), fetches)
            if on_cpu and self.cpu_experts and not index:
                yield self.cpu_experts.slab(layer, wave.experts)
            else:
                yield from self._with_release(self._slab(cache, slot_of, wave.experts))

    def _used_and_tokens(self, request: ExpertRequest) -> tuple[Mask, TokenCounts | None]:
        """Who is used, and for how many tokens where that matters: one read of the device."""
        tokens = None if self.cpu_experts is None else request.token_counts
        if tokens is None:
            return request.used.cpu().numpy(), None
        both = torch.stack([request.used.to(tokens.dtype), tokens]).cpu().numpy()
        return both[0] > 0, both[1]

    def _cpu_misses(self, missed_mask: Mask, token_counts: TokenCounts | None) -> Mask:
        """[E]: who is computed where it lies."""
        if self.cpu_experts is None or token_counts is None:
            return np.zeros_like(missed_mask)
        return self.cpu_experts.selection.select(missed_mask, token_counts)

    @property
    def experts_used(self) -> int:
        """Experts asked for so far."""
        return self.traffic_log.traffic().experts_used

    @property
    def experts_moved(self) -> int:
        """Experts that came so far."""
        return self.traffic_log.traffic().experts_moved

    @property
    def stall_seconds(self) -> float:
        """Seconds in which nothing was computed."""
        return self.fetcher.stall_seconds

    def resident(self, layer: int) -> Tensor | None:
        cache = self._layer(layer)
        if not cache.resident_mask:
            cache.resident_mask.append(self.fetcher.to_device(cache.slots.resident))
        return cache.resident_mask[0]

    def slots(self, layer: int) -> int | None:
        del layer
        return self.capacity

    def reset(self) -> None:
        """Forget who is here; the memory itself is kept, and those of the start come back."""
        self.traffic_log.log_reset()
        layers = tuple(self._layers)
        self._layers.clear()
        self._failed_layers.clear()
        for layer in layers:
            self._layer(layer)

    def _layer(self, layer: int) -> LayerCache:
        if layer not in self._layers:
            # Only the first time: an expert that cannot be read and that nobody needs is no reason
            # to fail again.
            warm_votes = None if layer in self._failed_layers else self.warm_votes.get(layer)
            slots = Slots(self.experts, self.capacity, self.eviction, warm_votes)
            if layer not in self._memory:
                self._memory[layer] = allocate_slots(
                    self.allocate, slots.capacity, self.expert_bytes
                )
                self.fetcher.mark_computed()  # with what lay there before
            cache = LayerCache(slots, self._memory[layer])
            self._warm_start(layer, cache)
            self._layers[layer] = cache
        return self._layers[layer]

    def _warm_start(self, layer: int, cache: LayerCache) -> None:
        """Those that are to be there from the start."""
        loads = [
            (expert, slot) for slot, expert in enumerate(cache.slots.expert_of) if expert != EMPTY
        ]
        fetches: dict[int, Future[str]] = {}
        try:
            self._fetch(layer, cache, loads, fetches)
            self._wait(fetches)
        except BaseException as error:
            self._discard_layer(layer, fetches, error)
            raise

    def _discard_layer(
        self, layer: int, fetches: Mapping[int, Future[str]], error: BaseException
    ) -> None:
        """Nobody is here any more, once nothing is on its way."""
        # Whoever interrupts this wait leaves no slots into which something still comes.
        memory = self._memory.pop(layer)
        self._layers.pop(layer, None)
        self._failed_layers.add(layer)
        self.fetcher.drain(fetches.values())
        # Ctrl-C between asking for an expert and noting it leaves one on its way unknown to all.
        if not isinstance(error, KeyboardInterrupt):
            self._memory[layer] = memory

    def _fetch(
        self,
        layer: int,
        cache: LayerCache,
        loads: Sequence[tuple[int, int]],
        fetches: dict[int, Future[str]],
    ) -> None:
        """Begin those of these loads that have not begun."""
        for expert, slot in loads:
            if expert not in fetches:
                fetches[expert] = self.fetcher.fetch_async(layer, expert, cache.memory[slot])

    def _wait(self, fetches: dict[int, Future[str]]) -> None:
        """Those that were begun are there, or this raises; nobody is on the way then."""
        if not fetches:
            return
        self.fetcher.wait(fetches.values())
        # All are done, as the courier has promised; counting them shall not wait in its stead.
        for fetch in fetches.values():
            if fetch.done():
                self.traffic_log.log_transfer(fetch.result())
        fetches.clear()

    def _with_release(self, slab: Slab) -> Iterator[Slab]:
        """Nothing that comes later overwrites what was asked to be computed with it."""
        try:
            yield slab
        finally:
            self.fetcher.mark_computed()

    def _resident_slab(self, cache: LayerCache) -> Slab:
        """Of all that are here, made once for as long as nobody comes."""
        if not cache.resident_slab:
            cache.resident_slab.append(
                self.make_slab(cache.memory, self.fetcher.to_device(cache.slots.slot_of))
            )
        return cache.resident_slab[0]

    def _slab(self, cache: LayerCache, wave_slot_of: SlotIndices, experts: Sequence[int]) -> Slab:
        """Of these experts alone."""
        slot_of = np.full(self.experts, EMPTY, dtype=np.int64)
        selected_ids = list(experts)
        slot_of[selected_ids] = wave_slot_of[selected_ids]
        return self.make_slab(cache.memory, self.fetcher.to_device(slot_of))


def allocate_slots(allocate: SlotAllocator, slots: int, expert_bytes: int) -> Tensor:
    """That memory; raises CoterieError where the system has none."""
    try:
        # Threads write into it, and none of them is in the mode that a forward may be in.
        with torch.inference_mode(False):
            return allocate(slots, expert_bytes)
    except (OSError, MemoryError, RuntimeError) as error:
        raise CoterieError(
            f"no memory for {slots} experts of {expert_bytes:,} bytes ({str(error).splitlines()[0]}); "
            "give --expert-memory less"
        ) from None


def _prefetchable_loads(waves: Sequence[Wave], slot_of: SlotIndices) -> list[tuple[int, int]]:
    """Of the loads that come next, those into slots that no wave before them reads."""
    read_slots: set[int] = set()
    for previous, wave in pairwise(waves):
        read_slots |= set(slot_of[list(previous.experts)].tolist())
        if wave.loads:
            return [(expert, slot) for expert, slot in wave.loads if slot not in read_slots]
    return []


def _slots_after(slot_of: SlotIndices, loads: Sequence[tuple[int, int]]) -> SlotIndices:
    """Who lies in which slot once these loads are done."""
    slot_of = slot_of.copy()
    for expert, slot in loads:
        slot_of[slot_of == slot] = EMPTY
        slot_of[expert] = slot
    return slot_of
