"""The coreset rules that have a name: points of the grid of vote, size, protection, residency.

A ``beta`` is one share for all layers, or a list with one for each layer that routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from coterie.naming import CoterieError
from coterie.routing.coreset import Election, elected, ruled
from coterie.routing.size import Fixed, Fraction, Mass, Priced, Size, Union
from coterie.spelling import Count, Offers, Share, Shares, Within, check_options
from coterie.values import Scores

Price = Annotated[float, Within(above=0)]

WHOLE = ("voters", "protect", "vote", "scope", "resident_bonus", "max_vote_loss", "seed", "max")
OPEN = Offers((*WHOLE, "tally"))
BY_MARGIN = Offers(("voters", "protect", "scope", "resident_bonus", "max_vote_loss", "max"))
FIXED_VOTE = Offers(("voters", "protect", "scope", "resident_bonus", "max_vote_loss", "max"))
PREFERRING = Offers(WHOLE, shown=("resident_bonus", "max_vote_loss"))

BY_PROBABILITY = Election()
BY_COUNT = Election(vote="count")
BY_EVERY_SCORE = Election(vote="full", protect="top1")
BY_BEST_SCORE = Election(vote="max")
BY_LOT = Election(vote="random")
IN_PROPORTION = Election(vote="margin", tally="proportional")
RESIDENT_FIRST = Election(lam=1.0, eps=0.02)


@dataclass(frozen=True)
class DesSeq:
    """The union of every token's first ``k`` experts (DES, Eq. 5; simplified OEA)."""

    k: Count
    election: Annotated[Election, Offers(("voters", "scope", "max"))] = BY_PROBABILITY

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Union:
        return Union(self.k)


@dataclass(frozen=True)
class DesVote:
    """The share ``beta`` of experts with most votes, each token voting for its own experts with
    the router's probability (DES, Eq. 6)."""

    beta: Shares
    election: Annotated[Election, OPEN] = BY_PROBABILITY

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Fraction:
        return share(self.beta, scores)


@dataclass(frozen=True)
class UniformVote:
    """As DES-Vote, but each vote counts one (DES, the naive variant)."""

    beta: Shares
    election: Annotated[Election, FIXED_VOTE] = BY_COUNT

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Fraction:
        return share(self.beta, scores)


@dataclass(frozen=True)
class XShare:
    """Votes for all experts, every token's best one protected (XShare, arXiv 2602.07265)."""

    beta: Shares
    election: Annotated[Election, FIXED_VOTE] = BY_EVERY_SCORE

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Fraction:
        return share(self.beta, scores)


@dataclass(frozen=True)
class Racing:
    """The ``m`` experts with the best score from any token (LLaDA2.2's block routing)."""

    m: Count
    election: Annotated[Election, FIXED_VOTE] = BY_BEST_SCORE

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Fixed:
        return Fixed(self.m)


@dataclass(frozen=True)
class MassVote:
    """The fewest experts that hold the share ``tau`` of votes (dMoE's rule, arXiv 2605.30876);
    at least ``least``, by default as many as a token uses."""

    tau: Share
    least: Count | None = None
    election: Annotated[Election, OPEN] = BY_PROBABILITY

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Mass:
        return Mass(self.tau, self.least)


@dataclass(frozen=True)
class ProportionalVote:
    """The share ``beta`` of experts, elected one by one: each token splits one vote by its margins,
    and weighs less the more of its vote is seated (ours)."""

    beta: Shares
    election: Annotated[Election, BY_MARGIN] = IN_PROPORTION

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Fraction:
        return share(self.beta, scores)


@dataclass(frozen=True)
class PricedVote:
    """As ``proportional-vote``, but as long as the next expert is worth ``price`` to the block,
    1 being a whole token's vote: blocks and layers of like tokens elect fewer (ours)."""

    price: Price
    election: Annotated[Election, BY_MARGIN] = IN_PROPORTION

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Priced:
        return Priced(self.price)


@dataclass(frozen=True)
class Random:
    """A seeded random set of the share ``beta``, new in each layer and forward: the control."""

    beta: Shares
    election: Annotated[Election, Offers(("seed", "voters", "protect", "scope", "max"))] = BY_LOT

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Fraction:
        return share(self.beta, scores)


@dataclass(frozen=True)
class ResidentVote:
    """DES-Vote that prefers experts already in fast memory."""

    beta: Shares
    election: Annotated[Election, PREFERRING] = RESIDENT_FIRST

    __post_init__ = check_options
    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Fraction:
        return share(self.beta, scores)


@dataclass(frozen=True)
class Coreset:
    """Any point of the grid: one of ``beta``, ``m``, ``tau``, ``price`` or ``k`` says how many."""

    beta: Shares | None = None
    m: Count | None = None
    tau: Share | None = None
    least: Count | None = None
    price: Price | None = None
    k: Count | None = None
    election: Annotated[Election, OPEN] = BY_PROBABILITY

    def __post_init__(self) -> None:
        check_options(self)
        sizes = {name: getattr(self, name) for name in ("beta", "m", "tau", "price", "k")}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) != 1:
            raise CoterieError(
                f"takes exactly one of {', '.join(sizes)}, not {' and '.join(given) or 'none'}"
            )
        if self.least is not None and self.tau is None:
            raise CoterieError("least goes with tau")

    eligible, ruling = elected, ruled

    def size(self, scores: Scores) -> Size | Union:
        if self.beta is not None:
            return share(self.beta, scores)
        if self.m is not None:
            return Fixed(self.m)
        if self.tau is not None:
            return Mass(self.tau, self.least)
        if self.price is not None:
            return Priced(self.price)
        return Union(self.k or 1)


def share(beta: Shares, scores: Scores) -> Fraction:
    """The budget of the layer whose scores these are."""
    return Fraction(beta[scores.ordinal] if isinstance(beta, tuple) else beta)
