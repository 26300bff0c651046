"""A tier in front of another: memory of the host for some experts, whatever their layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition

import numpy as np
from torch import Tensor

from coterie.errors import CoterieError
from coterie.offload.eviction import CacheAccess, Eviction, FloatArray, Lfu
from coterie.offload.tiers import HOST, Tier


@dataclass  # not frozen: its users come and go
class HostSlot:
    """Where an expert lies. Nobody takes it away while it has users: who reads it in, or copies."""

    index: int
    users: int = 1
    ready: bool = False


@dataclass  # not frozen: it holds what was fetched
class HostCache:
    """``memory`` for some experts of any layer, over a tier that holds them all.

    What is fetched is read into it, in place of who is worth least of those whom nobody copies at
    the moment; who is there already is copied. The rule is told of fetches, not of votes: by who is
    fetched most, for those fetched last are in the slots that asked for them
    (`results/prefetch-replayed.json`). From any thread, several at once: of those who want the same
    expert one reads it, the others wait. A read that fails leaves nothing behind, and every other
    expert where it is.
    """

    backing_tier: Tier
    memory: Tensor  # [n, bytes of an expert] uint8
    layers: Sequence[int]
    experts: int  # of a layer
    eviction: Eviction = field(default_factory=Lfu)
    hits: int = 0
    misses: int = 0
    _slots: dict[int, HostSlot] = field(init=False, default_factory=dict)  # by number
    _free: list[int] = field(init=False)
    _scores: FloatArray = field(init=False)
    _changed: Condition = field(init=False, default_factory=Condition)

    def __post_init__(self) -> None:
        if self.eviction.needs_votes:
            raise CoterieError(
                "memory between tiers hears of fetches alone: lru and lfu go by them"
            )
        self._free = list(range(len(self.memory)))
        self._scores = self.eviction.initial_scores(np.zeros(len(self.layers) * self.experts))

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        with self.pin(layer, expert) as (blob, tier):
            target.copy_(blob)
        return tier

    @contextmanager
    def pin(self, layer: int, expert: int) -> Iterator[tuple[Tensor, str]]:
        """An expert's bytes, read in if need be, which stay where they are until this is left; and
        the tier that they were found in.

        Who takes one more while holding as many as there are slots waits for ever.
        """
        key = self.layers.index(layer) * self.experts + expert
        slot = self._acquire(key)
        try:
            blob = self.memory[slot.index]
            tier = HOST
            if not slot.ready:
                tier = self.backing_tier.fetch(layer, expert, blob)
                self._mark_ready(slot)
            yield blob, tier
        finally:
            self._release(key, slot)

    def _acquire(self, key: int) -> HostSlot:
        """The place of an expert, ready or this caller's to fill."""
        with self._changed:
            self._record_access(key)
            while True:
                host_slot = self._slots.get(key)
                if host_slot is None and (free_index := self._reclaim_slot()) is not None:
                    self.misses += 1
                    host_slot = self._slots[key] = HostSlot(free_index)
                    return host_slot
                if host_slot is not None and host_slot.ready:
                    self.hits += 1
                    host_slot.users += 1
                    return host_slot
                self._changed.wait()

    def _mark_ready(self, slot: HostSlot) -> None:
        with self._changed:
            slot.ready = True
            self._changed.notify_all()

    def _release(self, key: int, slot: HostSlot) -> None:
        with self._changed:
            slot.users -= 1
            if not slot.ready:
                del self._slots[key]
                self._free.append(slot.index)
            self._changed.notify_all()

    def _record_access(self, key: int) -> None:
        used = np.zeros(len(self._scores), dtype=bool)
        used[key] = True
        clock = self.hits + self.misses
        self._scores = self.eviction.updated_scores(
            self._scores, CacheAccess(clock, used, np.zeros(len(used)))
        )

    def _reclaim_slot(self) -> int | None:
        """A slot that nobody needs; None while all are in use."""
        if self._free:
            return self._free.pop()
        idle = [key for key, slot in self._slots.items() if not slot.users]
        if not idle:
            return None
        victim = min(idle, key=lambda number: (self._scores[number], -number))
        return self._slots.pop(victim).index


def host_cache_slots(budget: int, *, layers: int, experts: int, expert_bytes: int) -> int:
    """Experts that fit into so many bytes; raises CoterieError for less than one."""
    if budget < expert_bytes:
        raise CoterieError(
            f"--host-memory: {budget:,} bytes are less than one expert's {expert_bytes:,}"
        )
    return min(layers * experts, budget // expert_bytes)
