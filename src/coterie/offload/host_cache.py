"""A tier in host memory that caches experts of any layer in front of another tier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition

from torch import Tensor

from coterie.offload.tiers import HOST, Tier

ExpertKey = tuple[int, int]
"""A layer and an expert of it."""


@dataclass  # not frozen: its users change
class HostSlot:
    """The slot of one expert. It is not reclaimed while a thread fills it or copies from it."""

    index: int
    users: int = 1
    ready: bool = False


@dataclass  # not frozen: its content changes
class HostCache:
    """``memory`` for some experts of any layer, in front of a tier that holds all of them.

    A miss is read into the slot of the least frequently fetched expert that no thread uses. LRU
    would do worse, since recently fetched experts are already in the slots that requested them
    (`results/prefetch-replayed.json`). Several threads may fetch at once; of those that need the
    same expert, one reads it and the others wait. A failed read frees its slot and leaves all other
    experts cached.
    """

    backing_tier: Tier
    memory: Tensor  # [n, bytes of an expert] uint8
    hits: int = 0
    misses: int = 0
    _slots: dict[ExpertKey, HostSlot] = field(init=False, default_factory=dict)
    _free: list[int] = field(init=False)
    _uses: Counter[ExpertKey] = field(init=False, default_factory=Counter)
    _changed: Condition = field(init=False, default_factory=Condition)

    def __post_init__(self) -> None:
        self._free = list(range(len(self.memory)))

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        with self.pin(layer, expert) as (blob, tier):
            target.copy_(blob)
        return tier

    @contextmanager
    def pin(self, layer: int, expert: int) -> Iterator[tuple[Tensor, str]]:
        """An expert's bytes, which are not evicted inside the context, and the tier they came from.

        A thread must not pin more experts than there are slots: it would wait forever.
        """
        key = layer, expert
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

    def _acquire(self, key: ExpertKey) -> HostSlot:
        """The slot of an expert: ready, or new and to be filled by the caller."""
        with self._changed:
            self._uses[key] += 1
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

    def _release(self, key: ExpertKey, slot: HostSlot) -> None:
        with self._changed:
            slot.users -= 1
            if not slot.ready:
                del self._slots[key]
                self._free.append(slot.index)
            self._changed.notify_all()

    def _reclaim_slot(self) -> int | None:
        """A free slot, or that of an unused expert; None while all are in use."""
        if self._free:
            return self._free.pop()
        idle = [key for key, slot in self._slots.items() if not slot.users]
        if not idle:
            return None
        victim = min(idle, key=lambda key: (self._uses[key], -key[0], -key[1]))
        return self._slots.pop(victim).index
