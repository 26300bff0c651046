"""The slots of one layer's fast memory: who is in which, who comes, who makes room, in what waves.

Bookkeeping alone: no weights, no copies. A store does what the waves say; a replay counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coterie.experts.eviction import Eviction, Mask, Numbers, Seen
from coterie.naming import CoterieError

Places = NDArray[np.int64]

NOBODY = -1


@dataclass(frozen=True)
class Wave:
    """Experts that are computed together, once ``loads`` are done: (expert, slot) of each copy.

    A load overwrites a slot that no later wave of its forward reads, but an earlier one may.
    """

    experts: tuple[int, ...]
    loads: tuple[tuple[int, int], ...] = ()


@dataclass  # not frozen: what it holds changes with every forward
class Slots:
    """``capacity`` slots for the ``experts`` of a layer, under one rule of eviction.

    After a forward that fits, all its experts are here. One that does not fit comes in waves, the
    experts already here first, and leaves those worth most behind.
    """

    experts: int
    capacity: int
    rule: Eviction
    warm: Numbers | None = None  # [E] votes of earlier runs: the most voted are here from the start
    holds: list[int] = field(init=False)  # of each slot, its expert or NOBODY
    slot_of: Places = field(init=False)  # [E], NOBODY where an expert is not here
    clock: int = field(init=False, default=0)
    present: int = field(init=False)  # how many are here

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise CoterieError(f"{self.capacity} slots a layer; at least one is needed")
        self.capacity = min(self.capacity, self.experts)
        votes = np.zeros(self.experts) if self.warm is None else self.warm
        self._worth = self.rule.first(votes)
        self.holds, self.slot_of = begun(votes, self.capacity)
        self.present = int(np.count_nonzero(self.resident))

    @property
    def resident(self) -> Mask:
        """[E]: who is here."""
        return self.slot_of != NOBODY

    @property
    def complete(self) -> bool:
        """Whether every expert of the layer is here."""
        return self.present == self.experts

    def holds_all(self, used: Mask) -> bool:
        """Whether all of these are here; then serving them moves nobody."""
        return self.complete or not (used & (self.slot_of == NOBODY)).any()

    def note(self, used: Mask, votes: Numbers | None = None) -> None:
        """Learn what a forward uses; ``serve`` does so itself."""
        seen = Seen(self.clock, used, np.zeros(self.experts) if votes is None else votes)
        self._worth = self.rule.after(self._worth, seen)
        self.clock += 1

    def serve(self, used: Mask, votes: Numbers | None = None) -> list[Wave]:
        """Make every expert of ``used`` be here once, and say how; at least one wave if any is."""
        self.note(used, votes)
        here = self.resident
        hits, misses = used & here, used & ~here
        if not misses.any():
            return [Wave(_listed(hits))] if hits.any() else []
        kept = self._kept(used, misses)
        leaving = self._leaving(kept, used)
        waves = [Wave(_listed(hits))] if hits.any() else []
        passing, staying = _listed(misses & ~kept), _listed(misses & kept)
        for first in range(0, len(passing), max(1, len(leaving))):
            waves.append(self._load(passing[first : first + len(leaving)], leaving))
        if staying:
            waves.append(self._load(staying, leaving))
        return waves

    def _kept(self, used: Mask, misses: Mask) -> Mask:
        """[E]: who is here afterwards; needed ones first, then by worth, then by index."""
        there = used | self.resident
        order = np.lexsort((np.arange(self.experts), -self._worth, ~used, ~there))
        chosen = order[: min(self.capacity, int(there.sum()))]
        kept = np.zeros(self.experts, dtype=bool)
        kept[chosen] = True
        if misses.any() and not (kept & misses).any():
            # Whoever comes last must stand somewhere: in the place of the least of those here.
            kept[chosen[-1]] = False
            kept[next(expert for expert in order if misses[expert])] = True
        return kept

    def _leaving(self, kept: Mask, used: Mask) -> list[int]:
        """Slots to be overwritten: the free ones first, last those that this forward reads."""

        def late(slot: int) -> int:
            expert = self.holds[slot]
            return 0 if expert == NOBODY else 2 if used[expert] else 1

        slots = (s for s, expert in enumerate(self.holds) if expert == NOBODY or not kept[expert])
        return sorted(slots, key=late)

    def _load(self, experts: tuple[int, ...], into: list[int]) -> Wave:
        loads = tuple(zip(experts, into, strict=False))
        for expert, slot in loads:
            if (left := self.holds[slot]) != NOBODY:
                self.slot_of[left] = NOBODY
            else:
                self.present += 1
            self.holds[slot] = expert
            self.slot_of[expert] = slot
        return Wave(experts, loads)


def begun(votes: Numbers, capacity: int) -> tuple[list[int], Places]:
    """Who holds each slot before any forward, and the slots [E] of all: the most voted, if any."""
    best = np.lexsort((np.arange(len(votes)), -votes))[:capacity]
    known = [int(expert) for expert in best if votes[expert] > 0]
    slot_of = np.full(len(votes), NOBODY, dtype=np.int64)
    slot_of[known] = np.arange(len(known))
    return known + [NOBODY] * (capacity - len(known)), slot_of


def _listed(mask: Mask) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())
