"""Who of a layer has a place in the finer of two precisions, and who comes to one after a forward.

Bookkeeping alone: no weights, no copies. ``mixed`` does what the book says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from coterie.errors import CoterieError
from coterie.offload.eviction import CacheAccess, Eviction, FloatArray, Mask
from coterie.offload.slot_table import EMPTY, SlotIndices, initial_slots


@dataclass  # not frozen: what it holds changes with every forward
class HighPrecisionSlots:
    """``capacity`` places in the finer precision for the ``experts`` of a layer.

    A forward never waits for a place: who has none is served coarse, and may have one in the next
    forward. Nobody makes room for who is worth no more under the ``rule``.
    """

    experts: int
    capacity: int
    eviction: Eviction
    warm_votes: FloatArray | None = (
        None  # [E] votes of earlier runs: the most voted are fine from the start
    )
    expert_of: list[int] = field(init=False)  # of each place, its expert or NOBODY
    slot_of: SlotIndices = field(init=False)  # [E], NOBODY where an expert is coarse
    clock: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise CoterieError(f"{self.capacity} finer experts a layer; at least one is needed")
        self.capacity = min(self.capacity, self.experts)
        votes = np.zeros(self.experts) if self.warm_votes is None else self.warm_votes
        self._scores = self.eviction.initial_scores(votes)
        self.expert_of, self.slot_of = initial_slots(votes, self.capacity)

    @property
    def resident(self) -> Mask:
        """[E]: who is fine."""
        return self.slot_of != EMPTY

    def record_access(self, used: Mask, votes: FloatArray) -> None:
        """Learn what a forward uses and votes for."""
        self._scores = self.eviction.updated_scores(
            self._scores, CacheAccess(self.clock, used, votes)
        )
        self.clock += 1

    def promote(self, candidates: Mask, limit: int) -> tuple[tuple[int, int], ...]:
        """Give places to at most so many of ``missed`` [E], who have none: (expert, place) of each.

        Those worth most come first, of equals the lower index; who is worth least makes room, of
        equals the higher index.
        """
        order = np.lexsort((np.arange(self.experts), -self._scores))
        ranked = [int(expert) for expert in order if candidates[expert]][:limit]
        loads = []
        for expert in ranked:
            slot = self._slot_for(expert)
            if slot is None:
                break
            if (evicted := self.expert_of[slot]) != EMPTY:
                self.slot_of[evicted] = EMPTY
            self.expert_of[slot], self.slot_of[expert] = expert, slot
            loads.append((expert, slot))
        return tuple(loads)

    def _slot_for(self, expert: int) -> int | None:
        """A free place, or that of the least where it is worth less."""
        if EMPTY in self.expert_of:
            return self.expert_of.index(EMPTY)
        victim = min(self.expert_of, key=lambda one: (self._scores[one], -one))
        return int(self.slot_of[victim]) if self._scores[victim] < self._scores[expert] else None
