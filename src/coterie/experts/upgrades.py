"""Who of a layer has a place in the finer of two precisions, and who comes to one after a forward.

Bookkeeping alone: no weights, no copies. ``mixed`` does what the book says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from coterie.experts.eviction import Eviction, Mask, Numbers, Seen
from coterie.experts.slots import NOBODY, Places, begun
from coterie.naming import CoterieError


@dataclass  # not frozen: what it holds changes with every forward
class Finer:
    """``capacity`` places in the finer precision for the ``experts`` of a layer.

    A forward never waits for a place: who has none is served coarse, and may have one in the next
    forward. Nobody makes room for who is worth no more under the ``rule``.
    """

    experts: int
    capacity: int
    rule: Eviction
    warm: Numbers | None = None  # [E] votes of earlier runs: the most voted are fine from the start
    holds: list[int] = field(init=False)  # of each place, its expert or NOBODY
    slot_of: Places = field(init=False)  # [E], NOBODY where an expert is coarse
    clock: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise CoterieError(f"{self.capacity} finer experts a layer; at least one is needed")
        self.capacity = min(self.capacity, self.experts)
        votes = np.zeros(self.experts) if self.warm is None else self.warm
        self._worth = self.rule.first(votes)
        self.holds, self.slot_of = begun(votes, self.capacity)

    @property
    def resident(self) -> Mask:
        """[E]: who is fine."""
        return self.slot_of != NOBODY

    def note(self, used: Mask, votes: Numbers) -> None:
        """Learn what a forward uses and votes for."""
        self._worth = self.rule.after(self._worth, Seen(self.clock, used, votes))
        self.clock += 1

    def upgrade(self, missed: Mask, most: int) -> tuple[tuple[int, int], ...]:
        """Give places to at most so many of ``missed`` [E], who have none: (expert, place) of each.

        Those worth most come first, of equals the lower index; who is worth least makes room, of
        equals the higher index.
        """
        order = np.lexsort((np.arange(self.experts), -self._worth))
        wishing = [int(expert) for expert in order if missed[expert]][:most]
        found = []
        for expert in wishing:
            place = self._room_for(expert)
            if place is None:
                break
            if (left := self.holds[place]) != NOBODY:
                self.slot_of[left] = NOBODY
            self.holds[place], self.slot_of[expert] = expert, place
            found.append((expert, place))
        return tuple(found)

    def _room_for(self, expert: int) -> int | None:
        """A free place, or that of the least where it is worth less."""
        if NOBODY in self.holds:
            return self.holds.index(NOBODY)
        least = min(self.holds, key=lambda one: (self._worth[one], -one))
        return int(self.slot_of[least]) if self._worth[least] < self._worth[expert] else None
