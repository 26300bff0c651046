"""The slots of one layer's fast memory: who is in which, who comes, who makes room, in what waves.

Bookkeeping alone: no weights, no copies. A store does what the waves say; a replay counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coterie.errors import CoterieError
from coterie.offload.eviction import CacheAccess, Eviction, FloatArray, Mask

SlotIndices = NDArray[np.int64]

EMPTY = -1


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
    eviction: Eviction
    warm_votes: FloatArray | None = (
        None  # [E] votes of earlier runs: the most voted are here from the start
    )
    expert_of: list[int] = field(init=False)  # of each slot, its expert or NOBODY
    slot_of: SlotIndices = field(init=False)  # [E], NOBODY where an expert is not here
    clock: int = field(init=False, default=0)
    num_resident: int = field(init=False)  # how many are here

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise CoterieError(f"{self.capacity} slots a layer; at least one is needed")
        self.capacity = min(self.capacity, self.experts)
        votes = np.zeros(self.experts) if self.warm_votes is None else self.warm_votes
        self._scores = self.eviction.initial_scores(votes)
        self.expert_of, self.slot_of = initial_slots(votes, self.capacity)
        self.num_resident = int(np.count_nonzero(self.resident))

    @property
    def resident(self) -> Mask:
        """[E]: who is here."""
        return self.slot_of != EMPTY

    @property
    def holds_every_expert(self) -> bool:
        """Whether every expert of the layer is here."""
        return self.num_resident == self.experts

    def holds_all(self, used: Mask) -> bool:
        """Whether all of these are here; then serving them moves nobody."""
        return self.holds_every_expert or not (used & (self.slot_of == EMPTY)).any()

    def record_access(self, used: Mask, votes: FloatArray | None = None) -> None:
        """Learn what a forward uses; ``serve`` does so itself."""
        access = CacheAccess(self.clock, used, np.zeros(self.experts) if votes is None else votes)
        self._scores = self.eviction.updated_scores(self._scores, access)
        self.clock += 1

    def serve(self, used: Mask, votes: FloatArray | None = None) -> list[Wave]:
        """Make every expert of ``used`` be here once, and say how; at least one wave if any is."""
        self.record_access(used, votes)
        resident = self.resident
        hits, misses = used & resident, used & ~resident
        if not misses.any():
            return [Wave(_expert_ids(hits))] if hits.any() else []
        retained = self._retained(used, misses)
        free_slots = self._replaceable_slots(retained, used)
        waves = [Wave(_expert_ids(hits))] if hits.any() else []
        transient, retained_misses = _expert_ids(misses & ~retained), _expert_ids(misses & retained)
        for first in range(0, len(transient), max(1, len(free_slots))):
            waves.append(self._load(transient[first : first + len(free_slots)], free_slots))
        if retained_misses:
            waves.append(self._load(retained_misses, free_slots))
        return waves

    def _retained(self, used: Mask, misses: Mask) -> Mask:
        """[E]: who is here afterwards; needed ones first, then by worth, then by index."""
        candidates = used | self.resident
        order = np.lexsort((np.arange(self.experts), -self._scores, ~used, ~candidates))
        selected_ids = order[: min(self.capacity, int(candidates.sum()))]
        retained = np.zeros(self.experts, dtype=bool)
        retained[selected_ids] = True
        if misses.any() and not (retained & misses).any():
            # Whoever comes last must stand somewhere: in the place of the least of those here.
            retained[selected_ids[-1]] = False
            retained[next(expert for expert in order if misses[expert])] = True
        return retained

    def _replaceable_slots(self, retained: Mask, used: Mask) -> list[int]:
        """Slots to be overwritten: the free ones first, last those that this forward reads."""

        def eviction_order(slot: int) -> int:
            expert = self.expert_of[slot]
            return 0 if expert == EMPTY else 2 if used[expert] else 1

        slots = (
            s for s, expert in enumerate(self.expert_of) if expert == EMPTY or not retained[expert]
        )
        return sorted(slots, key=eviction_order)

    def _load(self, experts: tuple[int, ...], target_slots: list[int]) -> Wave:
        loads = tuple(zip(experts, target_slots, strict=False))
        for expert, slot in loads:
            if (evicted := self.expert_of[slot]) != EMPTY:
                self.slot_of[evicted] = EMPTY
            else:
                self.num_resident += 1
            self.expert_of[slot] = expert
            self.slot_of[expert] = slot
        return Wave(experts, loads)


def initial_slots(votes: FloatArray, capacity: int) -> tuple[list[int], SlotIndices]:
    """Who holds each slot before any forward, and the slots [E] of all: the most voted, if any."""
    top_ids = np.lexsort((np.arange(len(votes)), -votes))[:capacity]
    initial_ids = [int(expert) for expert in top_ids if votes[expert] > 0]
    slot_of = np.full(len(votes), EMPTY, dtype=np.int64)
    slot_of[initial_ids] = np.arange(len(initial_ids))
    return initial_ids + [EMPTY] * (capacity - len(initial_ids)), slot_of


def _expert_ids(mask: Mask) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())
