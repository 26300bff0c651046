"""Two precisions replayed: whom a forward would find fine, and what would come of either."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from coterie.engine.coarse import PrecisionPolicy, PrecisionSplit
from coterie.experts.eviction import ByVotes, Lru, Mask, FloatArray
from coterie.experts.mixed import top_by_mass, vote_shares
from coterie.experts.slots import Slots
from coterie.experts.upgrades import HighPrecisionSlots
from coterie.planning.booking import TraceVotes

CAME = ("at once", "later", "coarse")  # fine experts before or after they served, and coarse ones


@dataclass  # not frozen: it keeps book
class Mixture:
    """One layer's experts in two precisions, as ``experts.mixed`` serves them, on paper: experts
    used and found there, those that came, and sums over forwards."""

    fine: HighPrecisionSlots
    coarse: Slots
    most: int = 0  # upgrades after a forward
    mass: float = 0.0  # of its votes, whose experts are fine in it
    forwards: int = 0
    used: int = 0
    hits: int = 0
    came: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAME, 0))
    votes_fine: float = 0.0  # shares

    def serve(self, used: Mask, votes: FloatArray) -> None:
        """One forward."""
        before = self.fine.resident
        self.fine.record_access(used, votes)
        leaders = top_by_mass(votes, used, self.mass) & ~before
        self.came["at once"] += len(self.fine.promote(leaders, len(used)))
        finely = used & self.fine.resident
        coarsely = used & ~finely
        self.forwards += 1
        self.used += int(used.sum())
        self.hits += int((finely & before | coarsely & self.coarse.resident).sum())
        self.votes_fine += float(vote_shares(votes, used)[finely].sum())
        if coarsely.any():
            self.came["coarse"] += sum(len(wave.loads) for wave in self.coarse.serve(coarsely))
        self.came["later"] += len(self.fine.promote(coarsely, self.most))


def mix(
    memory: TraceVotes, used: Mask, split: PrecisionSplit, placement: PrecisionPolicy
) -> list[Mixture]:
    """Of every layer, where forwards of a trace use these experts [F, L, E]; nobody is there at
    first."""
    layers, experts = used.shape[1:]
    books = [
        Mixture(
            HighPrecisionSlots(experts, split.high_slots, ByVotes()),
            Slots(experts, split.low_slots, Lru()),
            placement.most,
            placement.mass,
        )
        for _ in range(layers)
    ]
    for places in memory.passes:
        together = np.logical_or.reduce(used[list(places)], axis=0)
        votes = np.sum([memory.votes[place] for place in places], axis=0)
        for layer, book in enumerate(books):
            book.serve(together[layer], votes[layer])
    return books
