"""Coresets: one set of experts per block.

A rule is a point of a grid: who votes x for whom x how it is tallied x how many are elected x who
is protected x what residency counts. Every published rule is one such point; this file is the grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.errors import CoterieError
from coterie.keys import Key
from coterie.ops import top_ids
from coterie.routing.proportional import ResidencyBonus, elect_sequentially
from coterie.routing.router import KernelRouting, vanilla_ids
from coterie.routing.size import CoresetSize, Fixed, Fraction, Mass, Union
from coterie.routing.votes import BALLOTS, BEFORE_EOS, TOPK_PROB, VOTES, Vote, Voters, vote_weights
from coterie.specs import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    UnitFraction,
    check_options,
)
from coterie.values import CoresetRule, DecodeProgress, Scores, expert_mask

MaxExperts = Literal["slots"] | PositiveInt


@dataclass(frozen=True)
class Election:
    """How a coreset is elected, whatever its size.

    ``lam`` favours experts already in fast memory, V' = V * (1 + lam * resident), as long as the
    coreset still holds 1 - ``eps`` of the votes that the plain one would hold. The tally is
    ``plain``: most votes first; or ``proportional``: one by one, each token's weight falling with
    the part of its vote that is seated (see ``proportional``); there gains are favoured, and the
    seats keep 1 - ``eps`` of what they could gain. No coreset has more than ``most``: a number, or
    "slots", as many as the layer has in fast memory (where all experts are there, any number). Of a
    union, or of protected experts, too many of them, those with most votes stay.
    """

    voters: Annotated[Voters, BEFORE_EOS] = "all"
    protect: Literal["none", "top1"] = "none"
    vote: Annotated[Vote, TOPK_PROB] = "masked"
    scope: Literal["block", "batch"] = "block"
    resident_bonus: Annotated[NonNegativeFloat, Key("resident_bonus", "lam")] = 0.0
    max_vote_loss: Annotated[UnitFraction, Key("max_vote_loss", "eps")] = 0.02
    seed: NonNegativeInt = 0
    tally: Literal["plain", "proportional"] = "plain"
    max_experts: Annotated[MaxExperts | None, Key("max", "most")] = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.tally == "proportional" and self.vote not in BALLOTS:
            raise CoterieError(
                f"tally=proportional needs a vote that each token casts: one of "
                f"{', '.join(map(TOPK_PROB.of, BALLOTS))}, not {self.vote}"
            )

    def size_limit(self, slots: int | None) -> int | None:
        """How many a coreset has at most, in a layer with so many slots."""
        return slots if self.max_experts == "slots" else self.max_experts


class CoresetPolicy(Protocol):
    """A policy that is a point of the grid: how many to elect where, and how."""

    @property
    def election(self) -> Election: ...

    def size(self, scores: Scores) -> CoresetSize | Union: ...


def coreset_mask(policy: CoresetPolicy, scores: Scores, k: int) -> Tensor:
    """The policy's ``eligible``."""
    return elect(scores, policy.size(scores), policy.election, k)


def coreset_kernel_rule(policy: CoresetPolicy, scores: Scores, k: int) -> KernelRouting | None:
    """The policy's ``ruling``: the same election in plain numbers, where these can say it."""
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
        if scores.previous_coresets is not None:
            return None
        scores = flatten_batch(scores)
    all_vote = election.voters == "all" and scores.voters is None
    if is_full_union(size, election, k) and not all_vote:
        if max_experts is not None:
            return None  # kernels have one voice for the union and the votes
        all_vote = True
    return KernelRouting(scores, rule, None if all_vote else vote_weights(scores, election.voters))


@lru_cache(maxsize=256)  # the same few for every layer of every forward
def coreset_rule(
    size: CoresetSize | Union,
    election: Election,
    k: int,
    experts: int,
    max_experts: int | None = None,
) -> CoresetRule | None:
    """What ``elect`` does, in plain numbers; None for lots, other tallies and other sizes."""
    if isinstance(size, Union) and max_experts is None:
        return CoresetRule(union=size.k)
    if election.tally != "plain" or election.vote == "random":
        return None
    rule = CoresetRule(
        vote=election.vote,
        protect=1 if election.protect == "top1" else 0,
        resident_bonus=election.resident_bonus,
        max_vote_loss=election.max_vote_loss,
        max_experts=max_experts or 0,
    )
    match size:
        case Union():
            return replace(rule, union=size.k, protect=0)
        case Fraction() | Fixed():
            count = min(size.search_limits(experts)[0], max_experts or experts)
            # Where nobody is protected, a smaller count says it all.
            return replace(rule, count=count, max_experts=rule.max_experts if rule.protect else 0)
        case Mass():
            return replace(rule, mass=size.tau, min_experts=size.minimum(experts, k))
        case _:
            return None


def is_full_union(size: CoresetSize | Union, election: Election, k: int) -> bool:
    """Whether the union is of all that tokens have, those the engine does not let vote too."""
    return isinstance(size, Union) and size.k >= k and election.voters == "all"


def elect(scores: Scores, size: CoresetSize | Union, election: Election, k: int) -> Tensor:
    """The coreset as a mask [S, 1, E]; [1, 1, E] when all rows share one."""
    max_experts = election.size_limit(scores.slots)
    full_union = is_full_union(size, election, k)
    if full_union and max_experts is None:
        return scores.logits.new_ones((1, 1, 1), dtype=torch.bool)
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
    if election.tally == "proportional":
        ballots = BALLOTS[election.vote](scores)  # [S, N, E]
        bonus = residency_bonus(scores, election)
        return take_sequentially(
            ballots, vote_weight, protected, size, k, max_experts=max_experts, bonus=bonus
        ).unsqueeze(1)
    votes = VOTES[election.vote](scores, vote_weight, election.seed)  # [S, E]
    coreset = take_by_votes(votes, protected, size, k, max_experts=max_experts)
    if election.resident_bonus > 0 and scores.resident is not None:
        bonus_votes = votes * (1 + election.resident_bonus * scores.resident.double())
        bonus_coreset = take_by_votes(bonus_votes, protected, size, k, max_experts=max_experts)
        coreset = restore_votes(bonus_coreset, coreset, votes, election.max_vote_loss)
    return coreset.unsqueeze(1)


def union_of_topm(scores: Scores, vote_weight: Tensor, m: int) -> Tensor:
    """Mask [S, E]: the union over voters of the first ``m`` of their own experts."""
    ids = vanilla_ids(scores)[..., :m].masked_fill((vote_weight <= 0).unsqueeze(-1), -1)
    return expert_mask(ids.flatten(1), scores.router.experts)


def take_by_votes(
    votes: Tensor, protected: Tensor, size: CoresetSize, k: int, *, max_experts: int | None = None
) -> Tensor:
    """Mask [S, E]: the protected experts, then those with most votes until ``size`` is reached.

    Protected experts use up the budget; when they alone exceed it, they are the coreset, as
    far as the ``cap`` lets them.
    """
    order = top_ids(votes, votes.shape[-1], tier=~protected)
    return take_in_order(
        order, votes.gather(-1, order), protected, size, k, max_experts=max_experts
    )


def residency_bonus(scores: Scores, election: Election) -> ResidencyBonus | None:
    """What residency counts where seats are taken in turn; None where it counts nothing."""
    if election.resident_bonus == 0 or scores.resident is None:
        return None
    return ResidencyBonus(scores.resident, election.resident_bonus, election.max_vote_loss)


def take_sequentially(
    ballots: Tensor,
    vote_weight: Tensor,
    protected: Tensor,
    size: CoresetSize,
    k: int,
    *,
    max_experts: int | None = None,
    bonus: ResidencyBonus | None = None,
) -> Tensor:
    """Mask [S, E]: the protected experts, then one by one, votes being tallied again for each."""
    max_steps, min_gain = size.search_limits(protected.shape[-1])
    max_steps = max(max_steps, int(protected.sum(-1).max()))
    max_steps = max_steps if max_experts is None else min(max_steps, max_experts)
    order, gains = elect_sequentially(
        ballots, vote_weight, protected, max_steps=max_steps, k=k, min_gain=min_gain, bonus=bonus
    )
    return take_in_order(order, gains, protected, size, k, max_experts=max_experts)


def take_in_order(
    order: Tensor,
    votes: Tensor,
    protected: Tensor,
    size: CoresetSize,
    k: int,
    *,
    max_experts: int | None = None,
) -> Tensor:
    """Mask [S, E]: as many of ``order`` [S, m] as ``size`` says of their votes [S, m]."""
    experts, ranked = protected.shape[-1], order.shape[-1]
    budget = size.count(F.pad(votes, (0, experts - ranked)), k)
    budget = budget.maximum(protected.sum(dim=-1, keepdim=True))  # [S, 1]
    budget = budget if max_experts is None else budget.clamp(max=max_experts)
    position = torch.arange(ranked, device=votes.device)
    return torch.zeros_like(protected).scatter_(-1, order, position < budget)


def restore_votes(
    bonus_coreset: Tensor, plain_coreset: Tensor, votes: Tensor, eps: float
) -> Tensor:
    """Mask [S, E]: ``favoured``, with the least change that holds (1 - eps) of ``plain``'s votes.

    The largest missing experts come back one by one, each in the place of the weakest that had
    taken their seats: the budget stands.
    """
    missing, extra = plain_coreset & ~bonus_coreset, bonus_coreset & ~plain_coreset
    experts = votes.shape[-1]
    restore_order, remove_order = (
        top_ids(votes, experts, tier=~missing),
        top_ids(-votes, experts, tier=~extra),
    )
    swap_gain = (votes * missing).gather(-1, restore_order) - (votes * extra).gather(
        -1, remove_order
    )
    total = (votes * bonus_coreset).sum(-1, keepdim=True)
    total = torch.cat(
        [total, total + swap_gain.cumsum(-1)], dim=-1
    )  # [S, 1 + E]: after 0, 1, .. swaps
    min_total = (votes * plain_coreset).sum(-1, keepdim=True).double() * (1 - eps)
    swaps = (total < min_total).long().cumprod(-1).sum(-1, keepdim=True)
    swapped = torch.arange(experts, device=votes.device) < swaps
    restored = torch.zeros_like(plain_coreset).scatter_(-1, restore_order, swapped) & missing
    removed = torch.zeros_like(plain_coreset).scatter_(-1, remove_order, swapped) & extra
    return (bonus_coreset | restored) & ~removed


def flatten_batch(scores: Scores) -> Scores:
    """All rows as one row of S * N tokens, so that a batch elects one coreset."""

    def flatten(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flatten(0, 1).unsqueeze(0)

    progress = scores.progress or DecodeProgress()
    return replace(
        scores,
        logits=scores.logits.flatten(0, 1).unsqueeze(0),
        voters=flatten(scores.voters),
        progress=DecodeProgress(
            masked=flatten(progress.masked),
            after_eos=flatten(progress.after_eos),
            uncertainty=flatten(progress.uncertainty),
        ),
        importance=flatten(scores.importance),
        vanilla_ids=flatten(scores.vanilla_ids),
        forward_indices=scores.forward_indices[:1],
    )
