"""The expert store with a cache: some experts per layer in slots, the rest fetched on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from coterie.errors import OffloadError
from coterie.offload.cpu_experts import CpuExperts, TokenCounts
from coterie.offload.eviction import Eviction, FloatArray, Lru, Mask, eviction_votes
from coterie.offload.fetchers import ExpertFetcher
from coterie.offload.slot_table import EMPTY, Slots, Wave
from coterie.offload.traffic_log import TrafficLog
from coterie.values import ExpertRequest, Slab

SlabFactory = Callable[[Tensor, Tensor], Slab]
"""Makes a slab over slots [n, bytes of an expert] uint8 and ``slot_of`` [E]."""

SlotAllocator = Callable[[int, int], Tensor]
"""Allocates (slots, bytes of an expert), uint8."""


@dataclass  # not frozen: its content changes with every forward
class LayerCache:
    """One layer's cache: the slot table, the slots' memory, and the fetches in flight."""

    slots: Slots
    memory: Tensor  # [capacity, bytes of an expert] uint8
    fetches: dict[int, Future[str]] = field(default_factory=dict)  # by expert
    slab: Slab | None = None  # of all resident experts; None until it is needed
    mask: Tensor | None = None  # [E] bool on the device: resident experts; None until needed

    def invalidate(self) -> None:
        """Drop what was derived from the slot table, which is about to change."""
        self.slab = self.mask = None


@dataclass  # not frozen: its caches change with every forward
class CachedExpertStore:
    """An expert store with ``capacity`` slots per layer and a fetcher for all other experts.

    Cached experts are computed while others are fetched. A forward that uses more experts than
    there are slots is served in waves. A slot is reused only after the compute that reads it has
    been enqueued, i.e. once the caller asks for the next slab. ``serve`` reads on the host which
    experts are used: on a GPU this is its only wait for compute. If a fetch fails, the layer's
    cache is emptied and the error names the expert. A layer's slots are allocated, and filled with
    its warm-start experts, at first use.
    """

    fetcher: ExpertFetcher
    make_slab: SlabFactory
    allocate: SlotAllocator
    experts: int
    expert_bytes: int
    capacity: int
    eviction: Eviction = field(default_factory=Lru)
    warm_votes: Mapping[int, FloatArray] = field(default_factory=dict)  # [E] by layer, earlier runs
    cpu_experts: CpuExperts | None = None  # computes some misses in host memory: no fetch
    traffic_log: TrafficLog = field(init=False)
    log_transfer: Callable[[str], None] = field(init=False)  # called with the tier of each fetch
    _layers: dict[int, LayerCache] = field(init=False, default_factory=dict)
    _memory: dict[int, Tensor] = field(init=False, default_factory=dict)  # by layer; reset keeps it
    _failed_layers: set[int] = field(init=False, default_factory=set)

    precision_stats = None

    def __post_init__(self) -> None:
        self.traffic_log = TrafficLog(
            self.expert_bytes,
            lambda layer: Slots(self.experts, self.capacity, Lru(), self.warm_votes.get(layer)),
            lambda: self.fetcher.stall_seconds,
        )
        self.log_transfer = self.traffic_log.log_transfer

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        cache = self.layer_cache(layer)
        used_mask, token_counts = self._used_and_tokens(request)
        # If nothing is ever evicted, no eviction policy needs votes.
        evicts = self.capacity < self.experts
        votes = eviction_votes(self.eviction, request) if evicts else None
        if cache.slots.holds_all(used_mask):
            used = int(np.count_nonzero(used_mask))
            self.traffic_log.log_layer(layer, request, used=used, hits=used)
            if evicts:
                cache.slots.record_access(used_mask, votes)
            yield from self.resident_slabs(cache)
            return
        missed_mask = used_mask & ~cache.slots.resident
        cpu_mask = np.zeros_like(missed_mask)
        if self.cpu_experts is not None and token_counts is not None:
            cpu_mask = self.cpu_experts.selection.select(missed_mask, token_counts)
        used, missed, on_cpu = (
            int(np.count_nonzero(mask)) for mask in (used_mask, missed_mask, cpu_mask)
        )
        self.traffic_log.log_layer(layer, request, used=used, hits=used - missed, on_cpu=on_cpu)
        cache.invalidate()
        # From here on the slot table may list experts that are not loaded yet.
        with self.rollback_on_error(layer, cache):
            waves = cache.slots.serve(used_mask & ~cpu_mask, votes)
            if on_cpu:
                # First, so that the other waves' fetches run while the CPU computes.
                waves.insert(0, Wave(tuple(np.flatnonzero(cpu_mask).tolist())))
            yield from self._wave_slabs(layer, cache, waves)

    def resident(self, layer: int) -> Tensor | None:
        cache = self.layer_cache(layer)
        if cache.mask is None:
            cache.mask = self.fetcher.to_device(cache.slots.resident)
        return cache.mask

    def reset(self) -> None:
        """Empty the cache and reload the warm-start experts; allocated memory is reused."""
        self.traffic_log.log_reset()
        for cache in self._layers.values():
            if cache.fetches:
                self.fetcher.drain(cache.fetches.values())
                self._log_fetches(cache)
        layers = tuple(self._layers)
        self._layers.clear()
        self._failed_layers.clear()
        for layer in layers:
            self.layer_cache(layer)

    def layer_cache(self, layer: int) -> LayerCache:
        """The layer's cache, allocated and warm-started at first use."""
        if layer not in self._layers:
            # After a failure a layer starts empty: an unreadable expert that no forward uses must
            # not make every forward fail.
            warm_votes = None if layer in self._failed_layers else self.warm_votes.get(layer)
            slots = Slots(self.experts, self.capacity, self.eviction, warm_votes)
            if layer not in self._memory:
                self._memory[layer] = allocate_slots(
                    self.allocate, slots.capacity, self.expert_bytes
                )
                self.fetcher.mark_computed()  # earlier compute may still read this memory
            cache = LayerCache(slots, self._memory[layer])
            with self.rollback_on_error(layer, cache):
                self.fetch(layer, cache, slots.contents)
                self.wait(cache)
            self._layers[layer] = cache
        return self._layers[layer]

    def ready_cache(self, layer: int) -> LayerCache:
        """The layer's cache, once all fetches into it are done."""
        cache = self.layer_cache(layer)
        with self.rollback_on_error(layer, cache):
            self.wait(cache)
        return cache

    def fetch(self, layer: int, cache: LayerCache, loads: Sequence[tuple[int, int]]) -> None:
        """Start those of these (expert, slot) loads that are not in flight."""
        for expert, slot in loads:
            if expert not in cache.fetches:
                cache.fetches[expert] = self.fetcher.fetch_async(layer, expert, cache.memory[slot])

    def wait(self, cache: LayerCache) -> None:
        """Wait for all fetches in flight; raises the error of one that failed."""
        if cache.fetches:
            self.fetcher.wait(cache.fetches.values())
            self._log_fetches(cache)

    def resident_slabs(self, cache: LayerCache) -> Iterator[Slab]:
        """One slab of all resident experts, reused until the slot table changes."""
        if cache.slab is None:
            slot_of = self.fetcher.to_device(cache.slots.slot_of)
            cache.slab = self.make_slab(cache.memory, slot_of)
        yield from self._with_release(cache.slab)

    @contextmanager
    def rollback_on_error(self, layer: int, cache: LayerCache) -> Iterator[None]:
        """Empty the layer's cache on any error, since its slot table may list missing experts."""
        try:
            yield
        except BaseException as error:
            # If the drain is interrupted too, memory that a fetch may still write is not reused.
            memory = self._memory.pop(layer)
            self._layers.pop(layer, None)
            self._failed_layers.add(layer)
            self.fetcher.drain(cache.fetches.values())
            # Ctrl-C may arrive after a fetch has started and before it is registered in
            # ``fetches``. Such a fetch cannot be waited for.
            if not isinstance(error, KeyboardInterrupt):
                self._memory[layer] = memory
            raise

    def _wave_slabs(self, layer: int, cache: LayerCache, waves: Sequence[Wave]) -> Iterator[Slab]:
        """One slab per wave; a wave without slots is computed in host memory."""
        for index, wave in enumerate(waves):
            self.fetch(layer, cache, wave.loads)
            if wave.loads:
                self.wait(cache)
            self.fetch(layer, cache, _prefetchable_loads(waves[index:]))
            if self.cpu_experts is not None and not wave.slots:
                yield self.cpu_experts.slab(layer, wave.experts)
                continue
            slot_of = np.full(self.experts, EMPTY, dtype=np.int64)
            slot_of[list(wave.experts)] = wave.slots
            slab = self.make_slab(cache.memory, self.fetcher.to_device(slot_of))
            yield from self._with_release(slab)

    def _with_release(self, slab: Slab) -> Iterator[Slab]:
        """Later fetches may overwrite the slab's slots only after its compute."""
        try:
            yield slab
        finally:
            self.fetcher.mark_computed()

    def _used_and_tokens(self, request: ExpertRequest) -> tuple[Mask, TokenCounts | None]:
        """[E] each: used experts and, if the CPU computes some, their tokens; one device read."""
        tokens = None if self.cpu_experts is None else request.token_counts
        if tokens is None:
            return request.used.cpu().numpy(), None
        both = torch.stack([request.used.to(tokens.dtype), tokens]).cpu().numpy()
        return both[0] > 0, both[1]

    def _log_fetches(self, cache: LayerCache) -> None:
        """Log finished fetches, and forget all."""
        for fetch in cache.fetches.values():
            if fetch.done() and fetch.exception() is None:
                self.log_transfer(fetch.result())
        cache.fetches.clear()


def allocate_slots(allocate: SlotAllocator, slots: int, expert_bytes: int) -> Tensor:
    """The slots' memory; raises OffloadError where the system has too little."""
    try:
        # Fetch threads write into it outside of any inference mode that a forward may be in.
        with torch.inference_mode(False):
            return allocate(slots, expert_bytes)
    except (OSError, MemoryError, RuntimeError) as error:
        raise OffloadError(
            f"no memory for {slots} experts of {expert_bytes:,} bytes "
            f"({str(error).splitlines()[0]}); choose a smaller `expert_memory`"
        ) from None


def _prefetchable_loads(waves: Sequence[Wave]) -> list[tuple[int, int]]:
    """Those loads of the next wave with loads that go into slots no wave before it reads."""
    read_slots: set[int] = set()
    for previous, wave in pairwise(waves):
        read_slots |= set(previous.slots)
        if wave.loads:
            return [(expert, slot) for expert, slot in wave.loads if slot not in read_slots]
    return []
