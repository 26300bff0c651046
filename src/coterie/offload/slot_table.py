"""The slots of one layer's expert cache: which expert is in which slot, and what is loaded next.

Bookkeeping only, without weights or copies. A store carries the loads out; a replay counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coterie.errors import OffloadError
from coterie.offload.eviction import CacheAccess, Eviction, FloatArray, Mask

SlotIndices = NDArray[np.int64]

EMPTY = -1


@dataclass(frozen=True)
class Wave:
    """Experts computed together, their slots, and the (expert, slot) loads that must finish first.

    A load overwrites a slot that no later wave of the same forward reads. An earlier wave may read
    it.
    """

    experts: tuple[int, ...]
    slots: tuple[int, ...] = ()  # of each expert; none for experts that need no slot
    loads: tuple[tuple[int, int], ...] = ()


@dataclass  # not frozen: its content changes with every forward
class Slots:
    """``capacity`` slots for the ``experts`` of one layer, under one eviction policy.

    After a forward that fits, all its experts are cached. A forward that does not fit is served in
    waves, cached experts first; afterwards the experts with the highest scores stay cached.
    """

    experts: int
    capacity: int
    eviction: Eviction
    warm_votes: FloatArray | None = None  # [E] votes of earlier runs; the top ones start cached
    expert_of: list[int] = field(init=False)  # the expert of each slot, or EMPTY
    slot_of: SlotIndices = field(init=False)  # [E]; EMPTY for an expert that is not cached
    clock: int = field(init=False, default=0)
    num_resident: int = field(init=False)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise OffloadError(f"{self.capacity} slots per layer; at least one is needed")
        self.capacity = min(self.capacity, self.experts)
        votes = np.zeros(self.experts) if self.warm_votes is None else self.warm_votes
        self._scores = self.eviction.initial_scores(votes)
        self.expert_of, self.slot_of = initial_slots(votes, self.capacity)
        self.num_resident = int(np.count_nonzero(self.resident))

    @property
    def resident(self) -> Mask:
        """[E]: which experts are cached."""
        return self.slot_of != EMPTY

    @property
    def contents(self) -> list[tuple[int, int]]:
        """The (expert, slot) of every cached expert."""
        return [(expert, slot) for slot, expert in enumerate(self.expert_of) if expert != EMPTY]

    def holds_all(self, used: Mask) -> bool:
        """Whether all of these experts are cached, so that serving them needs no load."""
        return self.num_resident == self.experts or not (used & (self.slot_of == EMPTY)).any()

    def record_access(self, used: Mask, votes: FloatArray | None = None) -> None:
        """Update the scores with what a forward uses; ``serve`` does so itself."""
        access = CacheAccess(self.clock, used, np.zeros(self.experts) if votes is None else votes)
        self._scores = self.eviction.updated_scores(self._scores, access)
        self.clock += 1

    def serve(self, used: Mask, votes: FloatArray | None = None) -> list[Wave]:
        """Plan waves that together compute every expert of ``used`` once, and assign slots."""
        self.record_access(used, votes)
        resident = self.resident
        hits, misses = used & resident, used & ~resident
        hit_ids = _expert_ids(hits)
        waves = [Wave(hit_ids, tuple(self.slot_of[list(hit_ids)].tolist()))] if hit_ids else []
        if not misses.any():
            return waves
        retained = self._retained(used, misses)
        free_slots = self._replaceable_slots(retained, used)
        transient, retained_misses = _expert_ids(misses & ~retained), _expert_ids(misses & retained)
        for first in range(0, len(transient), max(1, len(free_slots))):
            waves.append(self._load(transient[first : first + len(free_slots)], free_slots))
        if retained_misses:
            waves.append(self._load(retained_misses, free_slots))
        return waves

    def promote(self, candidates: Mask, limit: int) -> tuple[tuple[int, int], ...]:
        """Assign slots to at most ``limit`` of these uncached experts [E]: (expert, slot) of each.

        The highest scores come first; ties go to the lower index. A cached expert is evicted only
        by one with a higher score: the lowest score first; ties evict the higher index.
        """
        order = np.lexsort((np.arange(self.experts), -self._scores))
        loads = []
        for expert in [int(expert) for expert in order if candidates[expert]][:limit]:
            slot = self._slot_for(expert)
            if slot is None:
                break
            self._assign(expert, slot)
            loads.append((expert, slot))
        return tuple(loads)

    def _slot_for(self, expert: int) -> int | None:
        """A free slot, or that of the lowest score if it is lower than this expert's."""
        if EMPTY in self.expert_of:
            return self.expert_of.index(EMPTY)
        victim = min(self.expert_of, key=lambda one: (self._scores[one], -one))
        return int(self.slot_of[victim]) if self._scores[victim] < self._scores[expert] else None

    def _retained(self, used: Mask, misses: Mask) -> Mask:
        """[E]: which experts are cached afterwards: used ones first, then by score and index."""
        candidates = used | self.resident
        order = np.lexsort((np.arange(self.experts), -self._scores, ~used, ~candidates))
        selected_ids = order[: min(self.capacity, int(candidates.sum()))]
        retained = np.zeros(self.experts, dtype=bool)
        retained[selected_ids] = True
        if misses.any() and not (retained & misses).any():
            # The last load needs a slot of its own: it takes that of the lowest retained score.
            retained[selected_ids[-1]] = False
            retained[next(expert for expert in order if misses[expert])] = True
        return retained

    def _replaceable_slots(self, retained: Mask, used: Mask) -> list[int]:
        """Slots to overwrite: free ones first, slots that this forward reads last."""

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
            self._assign(expert, slot)
        return Wave(experts, tuple(slot for _, slot in loads), loads)

    def _assign(self, expert: int, slot: int) -> None:
        if (evicted := self.expert_of[slot]) != EMPTY:
            self.slot_of[evicted] = EMPTY
        else:
            self.num_resident += 1
        self.expert_of[slot], self.slot_of[expert] = expert, slot


def initial_slots(votes: FloatArray, capacity: int) -> tuple[list[int], SlotIndices]:
    """The expert of each slot before any forward, and the slot of each expert [E]: top votes."""
    top_ids = np.lexsort((np.arange(len(votes)), -votes))[:capacity]
    initial_ids = [int(expert) for expert in top_ids if votes[expert] > 0]
    slot_of = np.full(len(votes), EMPTY, dtype=np.int64)
    slot_of[initial_ids] = np.arange(len(initial_ids))
    return initial_ids + [EMPTY] * (capacity - len(initial_ids)), slot_of


def _expert_ids(mask: Mask) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())
