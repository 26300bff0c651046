"""Which expert leaves fast memory when another comes: the rules, each an order of worth.

A rule gives every expert of a layer a number; those worth least leave first, of equals the higher
index. It learns from each forward what was used and voted for. All of it is exact in float64 and
knows nothing of slots: ``slots`` keeps these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.naming import CoterieError
from coterie.spelling import Share, check_options, parse
from coterie.values import Demand

Mask = NDArray[np.bool_]
Numbers = NDArray[np.float64]

NEVER = np.inf


@dataclass(frozen=True)
class Seen:
    """One forward of one layer, as a cache sees it."""

    clock: int  # forwards of this layer before it
    used: Mask  # [E], experts that it computes with
    votes: Numbers  # [E] >= 0, for experts that it does not use too


class Eviction(Protocol):
    """A rule: what places in fast memory are worth, as numbers [E] that it carries along."""

    @property
    def asks_votes(self) -> bool:
        """Whether it reads ``Seen.votes``; counting them takes time."""
        ...

    def first(self, votes: Numbers) -> Numbers:
        """Before any forward, from votes [E] that earlier runs have counted; zeros if none did."""
        ...

    def after(self, worth: Numbers, seen: Seen) -> Numbers:
        """The numbers once a forward is known, its own experts not yet in their places."""
        ...


@dataclass(frozen=True)
class Lru:
    """Who was used longest ago leaves."""

    asks_votes = False

    def first(self, votes: Numbers) -> Numbers:
        return ranks(votes) - len(votes)  # all before the first forward, in the order of votes

    def after(self, worth: Numbers, seen: Seen) -> Numbers:
        return np.where(seen.used, float(seen.clock), worth)


@dataclass(frozen=True)
class Lfu:
    """Who was used in the fewest forwards leaves."""

    asks_votes = False

    def first(self, votes: Numbers) -> Numbers:
        return ranks(votes) / len(votes)  # less than one use, in the order of votes

    def after(self, worth: Numbers, seen: Seen) -> Numbers:
        return worth + seen.used


@dataclass(frozen=True)
class ByVotes:
    """Who had the fewest votes lately leaves; a vote counts ``decay`` of itself a forward later."""

    decay: Share = 0.8

    asks_votes = True
    __post_init__ = check_options

    def first(self, votes: Numbers) -> Numbers:
        return votes.astype(np.float64)

    def after(self, worth: Numbers, seen: Seen) -> Numbers:
        return worth * self.decay + seen.votes


@dataclass(frozen=True)
class Belady:
    """Who is used again last leaves: the optimum, for replays, which know what comes.

    ``nexts`` [F, E]: of the forward of that number and each expert, the forward that uses it next,
    or NEVER.
    """

    nexts: Numbers

    asks_votes = False

    @staticmethod
    def of(used: Sequence[Mask]) -> Belady:
        """From what every forward of the layer uses, in order."""
        nexts = np.full((len(used), len(used[0])), NEVER)
        for clock in range(len(used) - 1, 0, -1):
            nexts[clock - 1] = np.where(used[clock], float(clock), nexts[clock])
        return Belady(nexts)

    def first(self, votes: Numbers) -> Numbers:
        return np.zeros(len(votes))

    def after(self, worth: Numbers, seen: Seen) -> Numbers:
        if seen.clock >= len(self.nexts):
            raise CoterieError(f"forward {seen.clock} is beyond the {len(self.nexts)} foreseen")
        return -self.nexts[seen.clock]


def ranks(votes: Numbers) -> Numbers:
    """[E]: 0 for who has fewest votes, E - 1 for who has most; of equals the lower index is more.

    Experts without a vote are all 0.
    """
    order = np.lexsort((-np.arange(len(votes)), votes))
    places = np.empty(len(votes))
    places[order] = np.arange(len(votes))
    return np.where(votes > 0, places, 0.0)


def asked_votes(rule: Eviction, demand: Demand) -> Numbers | None:
    """[E] of a forward, for a rule that goes by them; None for others, or where nobody voted."""
    votes = demand.votes if rule.asks_votes else None
    return None if votes is None else votes.cpu().numpy()


EVICTIONS: dict[str, type[Eviction]] = {"lru": Lru, "lfu": Lfu, "votes": ByVotes}


def parse_eviction(text: str) -> Eviction:
    """The rule that ``text`` spells, such as ``votes:decay=0.9``."""
    return parse(text, EVICTIONS, "eviction")
