"""Eviction rules: each gives every expert of a layer a score; the lowest is evicted first.

Ties evict the higher index. A rule updates its scores with what each forward uses and votes for,
exactly in float64. ``slot_table`` assigns the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coterie.errors import OffloadError
from coterie.specs import PositiveFraction, check_options, parse_spec
from coterie.values import ExpertRequest

Mask = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

NEVER_USED = np.inf


@dataclass(frozen=True)
class CacheAccess:
    """One forward of one layer, as a cache sees it."""

    clock: int  # earlier forwards of this layer
    used: Mask  # [E], experts that it computes
    votes: FloatArray  # [E] >= 0, also of experts that it does not use


class Eviction(Protocol):
    """An eviction policy, which maintains scores [E]."""

    @property
    def needs_votes(self) -> bool:
        """Whether it reads ``CacheAccess.votes``; counting them takes time."""
        ...

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        """Scores before any forward, from votes [E] of earlier runs (zeros if there are none)."""
        ...

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        """Scores after an access; the caller assigns slots to its experts afterwards."""
        ...


@dataclass(frozen=True)
class Lru:
    """Evicts the least recently used expert."""

    needs_votes = False

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        return vote_ranks(votes) - len(votes)  # below any clock, in the order of votes

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        return np.where(access.used, float(access.clock), scores)


@dataclass(frozen=True)
class Lfu:
    """Evicts the expert used in the fewest forwards."""

    needs_votes = False

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        return vote_ranks(votes) / len(votes)  # less than one use, in the order of votes

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        return scores + access.used


@dataclass(frozen=True)
class ByVotes:
    """Evicts the expert with the fewest recent votes; votes decay by ``decay`` per forward."""

    decay: PositiveFraction = 0.8

    needs_votes = True
    __post_init__ = check_options

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        return votes.astype(np.float64)

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        return scores * self.decay + access.votes


@dataclass(frozen=True)
class Belady:
    """Evicts the expert with the furthest next use: the optimum, for replays only."""

    next_uses: FloatArray  # [F, E]: after each forward, the next one that uses the expert, or inf

    needs_votes = False

    @staticmethod
    def from_uses(used: Sequence[Mask]) -> Belady:
        """The rule for the experts [E] that each forward of the layer uses, in order."""
        next_uses = np.full((len(used), len(used[0])), NEVER_USED)
        for clock in range(len(used) - 1, 0, -1):
            next_uses[clock - 1] = np.where(used[clock], float(clock), next_uses[clock])
        return Belady(next_uses)

    def initial_scores(self, votes: FloatArray) -> FloatArray:
        return np.zeros(len(votes))

    def updated_scores(self, scores: FloatArray, access: CacheAccess) -> FloatArray:
        if access.clock >= len(self.next_uses):
            raise OffloadError(
                f"forward {access.clock}: the uses of only {len(self.next_uses)} forwards are known"
            )
        return -self.next_uses[access.clock]


def vote_ranks(votes: FloatArray) -> FloatArray:
    """[E]: E - 1 for the most votes, ties to the lower index; 0 for all experts without a vote."""
    order = np.lexsort((-np.arange(len(votes)), votes))
    ranks = np.empty(len(votes))
    ranks[order] = np.arange(len(votes))
    return np.where(votes > 0, ranks, 0.0)


def eviction_votes(eviction: Eviction, request: ExpertRequest) -> FloatArray | None:
    """[E] votes of a request if the rule needs them; None otherwise, or without votes."""
    votes = request.votes if eviction.needs_votes else None
    return None if votes is None else votes.cpu().numpy()


EVICTIONS: dict[str, type[Eviction]] = {"lru": Lru, "lfu": Lfu, "votes": ByVotes}


def parse_eviction(text: str) -> Eviction:
    """Parse an eviction policy such as ``lru`` or ``votes:decay=0.9``."""
    return parse_spec(text, EVICTIONS, "eviction policy")
