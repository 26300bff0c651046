"""The named coreset policies. ``coterie policies`` prints the docstrings of their classes.

``beta`` is one share for all layers, or a list with one share for each layer that routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

from coterie.errors import SpecError
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
FIXED_VOTE_OPTIONS = NestedOptions(
    ("voters", "protect", "scope", "resident_bonus", "max_vote_loss", "max")
)
RESIDENT_OPTIONS = NestedOptions(
    ELECTION_OPTIONS, always_printed=("resident_bonus", "max_vote_loss")
)

PROBABILITY_ELECTION = Election()
COUNT_ELECTION = Election(vote="count")
FULL_PROBABILITY_ELECTION = Election(vote="full", protect="top1")
MAX_SCORE_ELECTION = Election(vote="max")
RANDOM_ELECTION = Election(vote="random")
PROPORTIONAL_ELECTION = Election(vote="margin", tally="proportional")
RESIDENT_ELECTION = Election(resident_bonus=1.0, max_vote_loss=0.02)


class _BetaPolicy(Protocol):
    @property
    def beta(self) -> PositiveFractions: ...


def beta_size(policy: _BetaPolicy, scores: Scores) -> Fraction:
    """The ``size`` of a policy with a ``beta``."""
    return layer_fraction(policy.beta, scores)


def layer_fraction(beta: PositiveFractions, scores: Scores) -> Fraction:
    """The share of the layer that the scores belong to."""
    return Fraction(beta[scores.moe_index] if isinstance(beta, tuple) else beta)


@dataclass(frozen=True)
class DesSeq:
    """A block uses the union of each token's first ``k`` experts (DES, Eq. 5; simplified OEA)."""

    k: PositiveInt
    election: Annotated[Election, NestedOptions(("voters", "scope", "max"))] = PROBABILITY_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Union:
        return Union(self.k)


@dataclass(frozen=True)
class DesVote:
    """A block uses the share ``beta`` of experts with most votes; a token's vote for each of its
    top-k experts is the router's probability (DES, Eq. 6)."""

    beta: PositiveFractions
    election: Annotated[Election, ALL_ELECTION_OPTIONS] = PROBABILITY_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule, size = coreset_mask, coreset_kernel_rule, beta_size


@dataclass(frozen=True)
class UniformVote:
    """Like ``des-vote``, but every vote counts 1 (DES, the naive variant)."""

    beta: PositiveFractions
    election: Annotated[Election, FIXED_VOTE_OPTIONS] = COUNT_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule, size = coreset_mask, coreset_kernel_rule, beta_size


@dataclass(frozen=True)
class XShare:
    """Like ``des-vote``, but tokens vote for all experts, and the best expert of each token is
    always included (XShare, arXiv 2602.07265)."""

    beta: PositiveFractions
    election: Annotated[Election, FIXED_VOTE_OPTIONS] = FULL_PROBABILITY_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule, size = coreset_mask, coreset_kernel_rule, beta_size


@dataclass(frozen=True)
class Racing:
    """A block uses the ``m`` experts with the highest score of any token (LLaDA2.2's block
    routing)."""

    m: PositiveInt
    election: Annotated[Election, FIXED_VOTE_OPTIONS] = MAX_SCORE_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Fixed:
        return Fixed(self.m)


@dataclass(frozen=True)
class MassVote:
    """A block uses the fewest experts that hold the share ``tau`` of all votes, but not fewer than
    ``least``, by default k (dMoE's rule, arXiv 2605.30876)."""

    tau: PositiveFraction
    least: PositiveInt | None = None
    election: Annotated[Election, ALL_ELECTION_OPTIONS] = PROBABILITY_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Mass:
        return Mass(self.tau, self.least)


@dataclass(frozen=True)
class ProportionalVote:
    """A block elects the share ``beta`` of experts one at a time; each token splits one vote by the
    margins of its experts, and weighs less once these are elected (ours)."""

    beta: PositiveFractions
    election: Annotated[Election, FIXED_VOTE_OPTIONS] = PROPORTIONAL_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule, size = coreset_mask, coreset_kernel_rule, beta_size


@dataclass(frozen=True)
class PricedVote:
    """Like ``proportional-vote``, but a block elects experts as long as the next one gains at least
    ``price`` votes, so similar tokens share fewer experts (ours)."""

    price: Price
    election: Annotated[Election, FIXED_VOTE_OPTIONS] = PROPORTIONAL_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule = coreset_mask, coreset_kernel_rule

    def size(self, scores: Scores) -> Priced:
        return Priced(self.price)


@dataclass(frozen=True)
class Random:
    """A block uses a random share ``beta`` of experts, drawn anew in each layer and forward, as a
    control."""

    beta: PositiveFractions
    election: Annotated[Election, NestedOptions(("seed", "voters", "protect", "scope", "max"))] = (
        RANDOM_ELECTION
    )

    __post_init__ = check_options
    eligible, kernel_rule, size = coreset_mask, coreset_kernel_rule, beta_size


@dataclass(frozen=True)
class ResidentVote:
    """Like ``des-vote``, but experts that are already in fast memory get a bonus."""

    beta: PositiveFractions
    election: Annotated[Election, RESIDENT_OPTIONS] = RESIDENT_ELECTION

    __post_init__ = check_options
    eligible, kernel_rule, size = coreset_mask, coreset_kernel_rule, beta_size


@dataclass(frozen=True)
class Coreset:
    """A block uses a coreset with any combination of options; one of ``beta``, ``m``, ``tau``,
    ``price`` or ``k`` gives its size."""

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
            raise SpecError(
                f"takes exactly one of {', '.join(sizes)}, not {' and '.join(set_sizes) or 'none'}"
            )
        if self.least is not None and self.tau is None:
            raise SpecError("least needs tau")

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
