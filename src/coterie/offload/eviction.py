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

from coterie.errors import CoterieError
from coterie.specs import PositiveFraction, check_options, parse_spec
from coterie.values import ExpertRequest

Mask = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

NEVER_USED = np.inf


@dataclass(frozen=True)
class CacheAccess:
    """One forward of one layer, as a cache sees it."""

    clock: int  # forwards of this layer before it
    used: Mask  # [E], experts that it computes with
    votes: FloatArray  # [E] >= 0, for experts that it does not use too


class Eviction(Protocol):
    """A rule: what places in fast memory are worth, as numbers [E] that it carries along."""

    @property
    def needs_votes(self) -> bool:
        """Whether it reads ``Seen.votes``; counting them takes time."""
        ...

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        """Before any forward, from votes [E] that earlier runs have counted; zeros if none did."""
        ...

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        """The numbers once a forward is known, its own experts not yet in their places."""
        ...


@dataclass(frozen=True)
class Lru:
    """Who was used longest ago leaves."""

    needs_votes = False

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        return vote_ranks(votes) - len(votes)  # all before the first forward, in the order of votes

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        return np.where(access.used, float(access.clock), scores)


@dataclass(frozen=True)
class Lfu:
    """Who was used in the fewest forwards leaves."""

    needs_votes = False

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        return vote_ranks(votes) / len(votes)  # less than one use, in the order of votes

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        return scores + access.used


@dataclass(frozen=True)
class ByVotes:
    """Who had the fewest votes lately leaves; a vote counts ``decay`` of itself a forward later."""

    decay: PositiveFraction = 0.8

    needs_votes = True
    __post_init__ = check_options

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        return votes.astype(np.float64)

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        return scores * self.decay + access.votes


@dataclass(frozen=True)
class Belady:
    """Who is used again last leaves: the optimum, for replays, which know what comes.

    ``nexts`` [F, E]: of the forward of that number and each expert, the forward that uses it next,
    or NEVER.
    """

    next_uses: FloatArray

    needs_votes = False

    @staticmethod
    def from_uses(used: Sequence[Mask]) -> Belady:
        """From what every forward of the layer uses, in order."""
        next_uses = np.full((len(used), len(used[0])), NEVER_USED)
        for clock in range(len(used) - 1, 0, -1):
            next_uses[clock - 1] = np.where(used[clock], float(clock), next_uses[clock])
        return Belady(next_uses)

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        return np.zeros(len(votes))

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        if access.clock >= len(self.next_uses):
            raise CoterieError(
                f"forward {access.clock} is beyond the {len(self.next_uses)} foreseen"
            )
        return -self.next_uses[access.clock]


def vote_ranks(votes: FloatArray) -> FloatArray:
    """[E]: 0 for who has fewest votes, E - 1 for who has most; of equals the lower index is more.

    Experts without a vote are all 0.
    """
    order = np.lexsort((-np.arange(len(votes)), votes))
    ranks = np.empty(len(votes))
    ranks[order] = np.arange(len(votes))
    return np.where(votes > 0, ranks, 0.0)


def eviction_votes(eviction: Eviction, request: ExpertRequest) -> FloatArray | None:
    """[E] of a forward, for a rule that goes by them; None for others, or where nobody voted."""
    votes = request.votes if eviction.needs_votes else None
    return None if votes is None else votes.cpu().numpy()


EVICTIONS: dict[str, type[Eviction]] = {"lru": Lru, "lfu": Lfu, "votes": ByVotes}


def parse_eviction(text: str) -> Eviction:
    """The rule that ``text`` spells, such as ``votes:decay=0.9``."""
    return parse_spec(text, EVICTIONS, "eviction")
