"""Coresets: one set of experts per block.

A rule is a point of a grid: who votes x for whom x how many are elected x who is protected x what
residency counts. Every published rule is one such point; this file is the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from coterie.ops import top_ids
from coterie.routing.select import own
from coterie.routing.votes import VOTES, Vote, Voters, voices
from coterie.spelling import Amount, Part, Whole, check_options
from coterie.values import Progress, Scores, membership


@dataclass(frozen=True)
class Election:
    """How a coreset is elected, whatever its size.

    ``lam`` favours experts already in fast memory, V' = V * (1 + lam * resident), as long as the
    coreset still holds 1 - ``eps`` of the votes that the plain one would hold.
    """

    voters: Voters = "all"
    protect: Literal["none", "top1"] = "none"
    vote: Vote = "masked"
    scope: Literal["block", "batch"] = "block"
    lam: Amount = 0.0
    eps: Part = 0.02
    seed: Whole = 0

    __post_init__ = check_options


class Size(Protocol):
    """How many experts to elect."""

    def count(self, votes: Tensor, k: int) -> Tensor:
        """[S, 1] or a scalar, from votes [S, E] in the order in which experts are taken."""
        ...


@dataclass(frozen=True)
class Fraction:
    """The floor(beta * E) experts with most votes, at least one."""

    beta: float

    def count(self, votes: Tensor, k: int) -> Tensor:
        return torch.tensor(max(1, math.floor(self.beta * votes.shape[-1] + 1e-9)))


@dataclass(frozen=True)
class Fixed:
    """The ``m`` experts with most votes."""

    m: int

    def count(self, votes: Tensor, k: int) -> Tensor:
        return torch.tensor(min(self.m, votes.shape[-1]))


@dataclass(frozen=True)
class Mass:
    """The fewest experts that hold the share ``tau`` of all votes, at least ``least`` (None: k)."""

    tau: float
    least: int | None = None

    def count(self, votes: Tensor, k: int) -> Tensor:
        held = votes.cumsum(dim=-1)
        enough = (held < self.tau * held[:, -1:].double()).sum(dim=-1, keepdim=True) + 1
        return enough.clamp(min=k if self.least is None else min(self.least, votes.shape[-1]))


@dataclass(frozen=True)
class Union:
    """Every voter's first ``k`` own experts (DES, Eq. 5); nothing is counted."""

    k: int


def elect(scores: Scores, size: Size | Union, election: Election, k: int) -> Tensor:
    """The coreset as a mask [S, 1, E]; [1, 1, E] when all rows share one."""
    if isinstance(size, Union) and size.k >= k and election.voters == "all":
        # Every token keeps all it has, those the engine does not let vote too: the plain model.
        return scores.logits.new_ones((1, 1, 1), dtype=torch.bool)
    if election.scope == "batch":
        scores = as_one_sequence(scores)
    voice = voices(scores, election.voters)
    if isinstance(size, Union):
        return first_choices(scores, voice, size.k).unsqueeze(1)
    votes = VOTES[election.vote](scores, voice, election.seed)  # [S, E]
    protected = first_choices(scores, voice, 1 if election.protect == "top1" else 0)
    coreset = take(votes, protected, size, k)
    if election.lam > 0 and scores.resident is not None:
        favoured = take(votes * (1 + election.lam * scores.resident.double()), protected, size, k)
        coreset = repaired(favoured, coreset, votes, election.eps)
    return coreset.unsqueeze(1)


def first_choices(scores: Scores, voice: Tensor, m: int) -> Tensor:
    """Mask [S, E]: the union over voters of the first ``m`` of their own experts."""
    ids = own(scores)[..., :m].masked_fill((voice <= 0).unsqueeze(-1), -1)
    return membership(ids.flatten(1), scores.router.experts)


def take(votes: Tensor, protected: Tensor, size: Size, k: int) -> Tensor:
    """Mask [S, E]: the protected experts, then those with most votes until ``size`` is reached.

    Protected experts use up the budget; when they alone exceed it, they are the coreset.
    """
    order = top_ids(votes, votes.shape[-1], tier=~protected)
    budget = size.count(votes.gather(-1, order), k).to(votes.device)
    budget = budget.maximum(protected.sum(dim=-1, keepdim=True))  # [S, 1]
    place = torch.arange(votes.shape[-1], device=votes.device)
    return torch.zeros_like(protected).scatter_(-1, order, place < budget)


def repaired(favoured: Tensor, plain: Tensor, votes: Tensor, eps: float) -> Tensor:
    """Mask [S, E]: ``favoured``, with the least change that holds (1 - eps) of ``plain``'s votes.

    The largest missing experts come back one by one, each in the place of the weakest that had
    taken their seats: the budget stands.
    """
    missing, intruders = plain & ~favoured, favoured & ~plain
    size = votes.shape[-1]
    back, out = top_ids(votes, size, tier=~missing), top_ids(-votes, size, tier=~intruders)
    swap = (votes * missing).gather(-1, back) - (votes * intruders).gather(-1, out)
    held = (votes * favoured).sum(-1, keepdim=True)
    held = torch.cat([held, held + swap.cumsum(-1)], dim=-1)  # [S, 1 + E]: after 0, 1, .. swaps
    floor = (votes * plain).sum(-1, keepdim=True).double() * (1 - eps)
    swaps = (held < floor).long().cumprod(-1).sum(-1, keepdim=True)
    done = torch.arange(size, device=votes.device) < swaps
    returned = torch.zeros_like(plain).scatter_(-1, back, done) & missing
    dismissed = torch.zeros_like(plain).scatter_(-1, out, done) & intruders
    return (favoured | returned) & ~dismissed


def as_one_sequence(scores: Scores) -> Scores:
    """All rows as one row of S * N tokens, so that a batch elects one coreset."""

    def joined(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.flatten(0, 1).unsqueeze(0)

    progress = scores.progress or Progress()
    return replace(
        scores,
        logits=scores.logits.flatten(0, 1).unsqueeze(0),
        voters=joined(scores.voters),
        progress=Progress(
            masked=joined(progress.masked),
            filled=joined(progress.filled),
            uncertainty=joined(progress.uncertainty),
        ),
        importance=joined(scores.importance),
        own=own(scores).flatten(0, 1).unsqueeze(0),
        forward=scores.forward[:1],
    )
