"""The coreset rules that have a name: points of the grid of vote, size, protection, residency.

A ``beta`` is one share for all layers, or a list with one for each layer that routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from coterie.errors import CoterieError
from coterie.routing.coreset import Election, coreset_kernel_rule, coreset_mask
from coterie.routing.size import CoresetSize, Fixed, Fraction, Mass, Priced, Union
from coterie.specs import (
    Bounds,
    NestedOptions,
    PositiveFraction,
    PositiveFractions,
    PositiveInt,
    check_options,
)
from coterie.values import Scores

Price = Annotated[float, Bounds(gt=0)]

ELECTION_OPTIONS = (
    "voters",
    "protect",
    "vote",
    "scope",
    "resident_bonus",
    "max_vote_loss",
    "seed",
    "max",
)
ALL_ELECTION_OPTIONS = NestedOptions((*ELECTION_OPTIONS, "tally"))
MARGIN_VOTE_OPTIONS = NestedOptions(
    ("voters", "protect", "scope", "resident_bonus", "max_vote_loss", "max")
)
FIXED_VOTE_OPTIONS = NestedOptions(
    ("voters", "protect", "scope", "resident_bonus", "max_vote_loss", "max")
)
PREFERRING = NestedOptions(ELECTION_OPTIONS, always_printed=("resident_bonus", "max_vote_loss"))

PROBABILITY_ELECTION = Election()
COUNT_ELECTION = Election(vote="count")
FULL_PROBABILITY_ELECTION = Election(vote="full", protect="top1")
MAX_SCORE_ELECTION = Election(vote="max")
RANDOM_ELECTION = Election(vote="random")
PROPORTIONAL_ELECTION = Election(vote="margin", tally="proportional")
RESIDENT_ELECTION = Election(resident_bonus=1.0, max_vote_loss=0.02)


@dataclass(frozen=True)
class DesSeq:
    """The union of every token's first ``k`` experts (DES, Eq. 5; simplified OEA)."""

    k: PositiveInt
    election: Annotated[Election, NestedOptions(("voters", "scope", "max"))] = PROBABILITY_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Union:
        return Union(self.k)


@dataclass(frozen=True)
class DesVote:
    """The share ``beta`` of experts with most votes, each token voting for its own experts with
    the router's probability (DES, Eq. 6)."""

    beta: PositiveFractions
    election: Annotated[Election, ALL_ELECTION_OPTIONS] = PROBABILITY_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Fraction:
        return layer_fraction(self.beta, scores)


@dataclass(frozen=True)
class UniformVote:
    """As DES-Vote, but each vote counts one (DES, the naive variant)."""

    beta: PositiveFractions
    election: Annotated[Election, FIXED_VOTE_OPTIONS] = COUNT_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Fraction:
        return layer_fraction(self.beta, scores)


@dataclass(frozen=True)
class XShare:
    """Votes for all experts, every token's best one protected (XShare, arXiv 2602.07265)."""

    beta: PositiveFractions
    election: Annotated[Election, FIXED_VOTE_OPTIONS] = FULL_PROBABILITY_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Fraction:
        return layer_fraction(self.beta, scores)


@dataclass(frozen=True)
class Racing:
    """The ``m`` experts with the best score from any token (LLaDA2.2's block routing)."""

    m: PositiveInt
    election: Annotated[Election, FIXED_VOTE_OPTIONS] = MAX_SCORE_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Fixed:
        return Fixed(self.m)


@dataclass(frozen=True)
class MassVote:
    """The fewest experts that hold the share ``tau`` of votes (dMoE's rule, arXiv 2605.30876);
    at least ``least``, by default as many as a token uses."""

    tau: PositiveFraction
    least: PositiveInt | None = None
    election: Annotated[Election, ALL_ELECTION_OPTIONS] = PROBABILITY_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Mass:
        return Mass(self.tau, self.least)


@dataclass(frozen=True)
class ProportionalVote:
    """The share ``beta`` of experts, elected one by one: each token splits one vote by its margins,
    and weighs less the more of its vote is seated (ours)."""

    beta: PositiveFractions
    election: Annotated[Election, MARGIN_VOTE_OPTIONS] = PROPORTIONAL_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Fraction:
        return layer_fraction(self.beta, scores)


@dataclass(frozen=True)
class PricedVote:
    """As ``proportional-vote``, but as long as the next expert is worth ``price`` to the block,
    1 being a whole token's vote: blocks and layers of like tokens elect fewer (ours)."""

    price: Price
    election: Annotated[Election, MARGIN_VOTE_OPTIONS] = PROPORTIONAL_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Priced:
        return Priced(self.price)


@dataclass(frozen=True)
class Random:
    """A seeded random set of the share ``beta``, new in each layer and forward: the control."""

    beta: PositiveFractions
    election: Annotated[Election, NestedOptions(("seed", "voters", "protect", "scope", "max"))] = (
        RANDOM_ELECTION
    )

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Fraction:
        return layer_fraction(self.beta, scores)


@dataclass(frozen=True)
class ResidentVote:
    """DES-Vote that prefers experts already in fast memory."""

    beta: PositiveFractions
    election: Annotated[Election, PREFERRING] = RESIDENT_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Fraction:
        return layer_fraction(self.beta, scores)


@dataclass(frozen=True)
class Coreset:
    """Any point of the grid: one of ``beta``, ``m``, ``tau``, ``price`` or ``k`` says how many."""

    beta: PositiveFractions | None = None
    m: PositiveInt | None = None
    tau: PositiveFraction | None = None
    least: PositiveInt | None = None
    price: Price | None = None
    k: PositiveInt | None = None
    election: Annotated[Election, ALL_ELECTION_OPTIONS] = PROBABILITY_ELECTION

    def __post_init__(self) -> None:
        check_options(self)
        sizes = {name: getattr(self, name) for name in ("beta", "m", "tau", "price", "k")}
        set_sizes = [name for name, value in sizes.items() if value is not None]
        if len(set_sizes) != 1:
            raise CoterieError(
                f"takes exactly one of {', '.join(sizes)}, not {' and '.join(set_sizes) or 'none'}"
            )
        if self.least is not None and self.tau is None:
            raise CoterieError("least goes with tau")

    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> CoresetSize | Union:
        if self.beta is not None:
            return layer_fraction(self.beta, scores)
        if self.m is not None:
            return Fixed(self.m)
        if self.tau is not None:
            return Mass(self.tau, self.least)
        if self.price is not None:
            return Priced(self.price)
        return Union(self.k or 1)


def layer_fraction(beta: PositiveFractions, scores: Scores) -> Fraction:
    """The budget of the layer whose scores these are."""
    return Fraction(beta[scores.moe_index] if isinstance(beta, tuple) else beta)
