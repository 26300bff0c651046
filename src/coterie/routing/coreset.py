"""Coresets: one set of experts for all tokens of a block.

A coreset policy is a combination of voters, kind of vote, tally, size, protected experts and bonus
for resident experts. Every published policy is such a combination; this file implements them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.errors import SpecError
from coterie.keys import Key
from coterie.ops import top_ids
from coterie.routing.proportional import ResidencyBonus, elect_sequentially
from coterie.routing.router import KernelRouting, admitted_experts, vanilla_ids
from coterie.routing.size import CoresetSize, Fixed, Fraction, Mass, Union
from coterie.routing.votes import (
    BALLOTS,
    VOTE_ALIAS,
    VOTERS_ALIAS,
    VOTES,
    Vote,
    Voters,
    vote_weights,
)
from coterie.specs import NonNegativeFloat, NonNegativeInt, PositiveInt, UnitFraction, check_options
from coterie.values import CoresetRule, DecodeProgress, Scores, expert_mask

MaxExperts = Literal["slots"] | PositiveInt


@dataclass(frozen=True)
class Election:
    """The options of an election, except for the size of the coreset.

    tally: ``plain`` takes the experts with most votes. ``proportional`` takes one expert at a time
    and lowers the weight of tokens with an elected expert (see ``proportional``).

    resident_bonus favours experts in fast memory: V' = V * (1 + resident_bonus * resident). The
    coreset keeps at least 1 - max_vote_loss of the votes (or gains, if proportional) that it would
    hold without the bonus.

    max_experts limits the coreset to a number, or to the ``slots`` of the layer in fast memory. If
    a union or the protected experts exceed the limit, those with most votes are used.
    """

    voters: Annotated[Voters, VOTERS_ALIAS] = "all"
    protect: Literal["none", "top1"] = "none"
    vote: Annotated[Vote, VOTE_ALIAS] = "topk-prob"
    scope: Literal["block", "batch"] = "block"
    resident_bonus: Annotated[NonNegativeFloat, Key("resident_bonus", "lam")] = 0.0
    max_vote_loss: Annotated[UnitFraction, Key("max_vote_loss", "eps")] = 0.02
    seed: NonNegativeInt = 0
    tally: Literal["plain", "proportional"] = "plain"
    max_experts: Annotated[MaxExperts | None, Key("max", "most")] = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.tally == "proportional" and self.vote not in BALLOTS:
            raise SpecError(
                f"tally=proportional needs a vote that each token casts: one of "
                f"{', '.join(BALLOTS)}, not {self.vote}"
            )

    def size_limit(self, slots: int | None) -> int | None:
        """The most experts of a coreset in a layer with this many slots; None if unlimited."""
        return slots if self.max_experts == "slots" else self.max_experts


class CoresetPolicy(Protocol):
    """A policy that elects a coreset."""

    @property
    def election(self) -> Election: ...

    def size(self, scores: Scores) -> CoresetSize | Union: ...


def coreset_mask(policy: CoresetPolicy, scores: Scores, k: int) -> Tensor:
    """The ``eligible`` of a coreset policy."""
    return elect(scores, policy.size(scores), policy.election, k)


def coreset_kernel_rule(policy: CoresetPolicy, scores: Scores, k: int) -> KernelRouting | None:
    """The ``kernel_rule`` of a coreset policy: the same election in plain numbers, if possible."""
    size, election = policy.size(scores), policy.election
    max_experts = election.size_limit(scores.slots)
    if (
        scores.previous_coresets is None
        and max_experts is None
        and is_full_union(size, election, k)
    ):
        return KernelRouting(scores)
    rule = coreset_rule(size, election, k, scores.router.experts, max_experts)
    if rule is None:
        return None
    if election.scope == "batch":
        if scores.previous_coresets is not None or scores.router.capacity:
            return None  # a kernel does not see where rows end
        scores = flatten_batch(scores)
    all_vote = election.voters == "all" and scores.voters is None
    if is_full_union(size, election, k) and not all_vote:
        if max_experts is not None:
            return None  # kernels use the same vote weights for the union and the votes
        all_vote = True
    return KernelRouting(scores, rule, None if all_vote else vote_weights(scores, election.voters))


@lru_cache(maxsize=256)  # a few rules serve every layer of every forward
def coreset_rule(
    size: CoresetSize | Union,
    election: Election,
    k: int,
    experts: int,
    max_experts: int | None = None,
) -> CoresetRule | None:
    """``elect`` in plain numbers; None for random votes, other tallies and other sizes."""
    if isinstance(size, Union) and max_experts is None:
        return CoresetRule(union=size.k)
    if election.tally != "plain" or election.vote == "random":
        return None
    limit, protect = max_experts or 0, 1 if election.protect == "top1" else 0
    rule = partial(
        CoresetRule,
        vote=election.vote,
        protect=protect,
        resident_bonus=election.resident_bonus,
        max_vote_loss=election.max_vote_loss,
        max_experts=limit,
    )
    match size:
        case Union():
            return rule(union=size.k, protect=0)
        case Fraction() | Fixed():
            count = min(size.search_limits(experts)[0], max_experts or experts)
            # Without protected experts the count alone is the limit.
            return rule(count=count, max_experts=limit if protect else 0)
        case Mass():
            return rule(mass=size.tau, min_experts=size.minimum(experts, k))
        case _:
            return None


def is_full_union(size: CoresetSize | Union, election: Election, k: int) -> bool:
    """Whether the coreset is the union of the top-k of all tokens, voters or not."""
    return isinstance(size, Union) and size.k >= k and election.voters == "all"


def elect(scores: Scores, size: CoresetSize | Union, election: Election, k: int) -> Tensor:
    """The coreset as a mask [S, 1, E]; [1, 1, E] if all rows share one.

    It is elected among the experts that the row's blocks admit.
    """
    max_experts = election.size_limit(scores.slots)
    full_union = is_full_union(size, election, k)
    if full_union and max_experts is None:
        return scores.logits.new_ones((1, 1, 1), dtype=torch.bool)
    scores = replace(scores, admitted=admitted_experts(scores))
    if election.scope == "batch":
        scores = flatten_batch(scores)
    vote_weight = vote_weights(scores, election.voters)
    if isinstance(size, Union):
        protected = union_of_topm(
            scores, torch.ones_like(vote_weight) if full_union else vote_weight, size.k
        )
        if max_experts is None:
            return protected.unsqueeze(1)
        size = Fixed(0)
    else:
        protected = union_of_topm(scores, vote_weight, 1 if election.protect == "top1" else 0)
    # [S, E]: experts that no block of the row admits
    excluded = None if scores.admitted is None else ~scores.admitted.any(dim=1)

    def take(order: Tensor, votes: Tensor) -> Tensor:
        return take_first(
            order, votes, protected, size, k, max_experts=max_experts, excluded=excluded
        )

    if election.tally == "proportional":
        order, gains = rank_sequentially(
            BALLOTS[election.vote](scores),
            vote_weight,
            protected,
            size,
            k,
            num_protected=vote_weight.shape[-1] if election.protect == "top1" else 0,
            max_experts=max_experts,
            bonus=residency_bonus(scores, election),
            excluded=excluded,
        )
        return take(order, gains).unsqueeze(1)
    votes = counted_votes(scores, vote_weight, election)
    coreset = take(*rank_by_votes(votes, protected, excluded))
    if election.resident_bonus > 0 and scores.resident is not None:
        bonus_votes = votes * (1 + election.resident_bonus * scores.resident.double())
        bonus_coreset = take(*rank_by_votes(bonus_votes, protected, excluded))
        coreset = restore_votes(bonus_coreset, coreset, votes, election.max_vote_loss)
    return coreset.unsqueeze(1)


def counted_votes(scores: Scores, vote_weight: Tensor, election: Election) -> Tensor:
    """[S, E] int64: each expert's votes; 0 for one that no block of the row admits."""
    votes, admitted = VOTES[election.vote](scores, vote_weight, election.seed), scores.admitted
    return votes if admitted is None else votes.masked_fill(~admitted.any(dim=1), 0)


def union_of_topm(scores: Scores, vote_weight: Tensor, m: int) -> Tensor:
    """Mask [S, E]: the union of the first ``m`` own experts of each voter."""
    ids = vanilla_ids(scores)[..., :m].masked_fill((vote_weight <= 0).unsqueeze(-1), -1)
    return expert_mask(ids.flatten(1), scores.router.experts)


def rank_by_votes(
    votes: Tensor, protected: Tensor, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Experts [S, E], the protected ones first, then by votes; and the votes in this order."""
    tier = (~protected).to(torch.uint8)
    tier = tier if excluded is None else tier + excluded
    order = top_ids(votes, votes.shape[-1], tier=tier)
    return order, votes.gather(-1, order)


def residency_bonus(scores: Scores, election: Election) -> ResidencyBonus | None:
    """The bonus of resident experts in a proportional election; None if there is none."""
    if election.resident_bonus == 0 or scores.resident is None:
        return None
    return ResidencyBonus(scores.resident, election.resident_bonus, election.max_vote_loss)


def rank_sequentially(
    ballots: Tensor,
    vote_weight: Tensor,
    protected: Tensor,
    size: CoresetSize,
    k: int,
    *,
    num_protected: int,
    max_experts: int | None = None,
    bonus: ResidencyBonus | None = None,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts [S, m], the protected ones first, then one at a time, each with new votes; and the
    gain of each. ``num_protected`` is the most experts that are protected in a row."""
    experts = protected.shape[-1]
    max_steps, min_gain = size.search_limits(experts)
    max_steps = max(max_steps, min(num_protected, experts))
    max_steps = max_steps if max_experts is None else min(max_steps, max_experts)
    if excluded is not None:
        ballots = ballots.masked_fill(excluded.unsqueeze(1), 0)
    return elect_sequentially(
        ballots,
        vote_weight,
        protected,
        max_steps=max_steps,
        k=k,
        min_gain=min_gain,
        bonus=bonus,
        excluded=excluded,
    )


def take_first(
    order: Tensor,
    votes: Tensor,
    protected: Tensor,
    size: CoresetSize,
    k: int,
    *,
    max_experts: int | None = None,
    excluded: Tensor | None = None,
) -> Tensor:
    """Mask [S, E]: the first experts of ``order`` [S, m], as many as ``size`` says.

    ``votes`` [S, m] are in that order, and protected experts are first. These count towards the
    size. If they alone exceed it, they are the coreset, up to ``max_experts``. ``excluded`` experts
    [S, E], without votes, are never taken.
    """
    experts, ranked = protected.shape[-1], order.shape[-1]
    budget = size.count(F.pad(votes, (0, experts - ranked)), k)
    budget = budget.maximum(protected.sum(dim=-1, keepdim=True))  # [S, 1]
    budget = budget if max_experts is None else budget.clamp(max=max_experts)
    position = torch.arange(ranked, device=votes.device)
    coreset = torch.zeros_like(protected).scatter_(-1, order, position < budget)
    return coreset if excluded is None else coreset & ~excluded


def restore_votes(
    bonus_coreset: Tensor, plain_coreset: Tensor, votes: Tensor, max_vote_loss: float
) -> Tensor:
    """Mask [S, E]: ``bonus_coreset``, changed until it holds 1 - ``max_vote_loss`` of the votes of
    ``plain_coreset``.

    Each change swaps the weakest expert that only the bonus elected for the strongest one that it
    displaced, so the size stays.
    """
    missing, extra = plain_coreset & ~bonus_coreset, bonus_coreset & ~plain_coreset
    experts = votes.shape[-1]
    restore_order = top_ids(votes, experts, tier=~missing)
    remove_order = top_ids(-votes, experts, tier=~extra)
    restored_votes = (votes * missing).gather(-1, restore_order)
    removed_votes = (votes * extra).gather(-1, remove_order)
    total = (votes * bonus_coreset).sum(-1, keepdim=True)
    swapped_total = total + (restored_votes - removed_votes).cumsum(-1)
    total = torch.cat([total, swapped_total], dim=-1)  # [S, 1 + E]: after 0, 1, .. swaps
    min_total = (votes * plain_coreset).sum(-1, keepdim=True).double() * (1 - max_vote_loss)
    swaps = (total < min_total).long().cumprod(-1).sum(-1, keepdim=True)
    swapped = torch.arange(experts, device=votes.device) < swaps
    restored = torch.zeros_like(plain_coreset).scatter_(-1, restore_order, swapped) & missing
    removed = torch.zeros_like(plain_coreset).scatter_(-1, remove_order, swapped) & extra
    return (bonus_coreset | restored) & ~removed


def flatten_batch(scores: Scores) -> Scores:
    """All rows as one row of S * N tokens, so that a batch elects one coreset."""

    def flatten(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flatten(0, 1).unsqueeze(0)

    progress = vars(scores.progress or DecodeProgress())
    return replace(
        scores,
        logits=scores.logits.flatten(0, 1).unsqueeze(0),
        voters=flatten(scores.voters),
        progress=DecodeProgress(**{name: flatten(tensor) for name, tensor in progress.items()}),
        importance=flatten(scores.importance),
        vanilla_ids=flatten(scores.vanilla_ids),
        starts=None,
        admitted=flatten(scores.admitted),
        forward_indices=scores.forward_indices[:1],
    )
