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

from coterie.keys import Key
from coterie.naming import CoterieError
from coterie.ops import top_ids
from coterie.routing.proportional import Favour, seats
from coterie.routing.select import Ruling, own
from coterie.routing.size import Fixed, Fraction, Mass, Size, Union
from coterie.routing.votes import BALLOTS, BEFORE_EOS, TOPK_PROB, VOTES, Vote, Voters, voices
from coterie.spelling import Amount, Count, Part, Whole, check_options
from coterie.values import Progress, Rule, Scores, membership

Most = Literal["slots"] | Count


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
    lam: Annotated[Amount, Key("resident_bonus", "lam")] = 0.0
    eps: Annotated[Part, Key("max_vote_loss", "eps")] = 0.02
    seed: Whole = 0
    tally: Literal["plain", "proportional"] = "plain"
    most: Annotated[Most | None, Key("max", "most")] = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.tally == "proportional" and self.vote not in BALLOTS:
            raise CoterieError(
                f"tally=proportional needs a vote that each token casts: one of "
                f"{', '.join(map(TOPK_PROB.of, BALLOTS))}, not {self.vote}"
            )

    def cap(self, slots: int | None) -> int | None:
        """How many a coreset has at most, in a layer with so many slots."""
        return slots if self.most == "slots" else self.most


class Elective(Protocol):
    """A policy that is a point of the grid: how many to elect where, and how."""

    @property
    def election(self) -> Election: ...

    def size(self, scores: Scores) -> Size | Union: ...


def elected(policy: Elective, scores: Scores, k: int) -> Tensor:
    """The policy's ``eligible``."""
    return elect(scores, policy.size(scores), policy.election, k)


def ruled(policy: Elective, scores: Scores, k: int) -> Ruling | None:
    """The policy's ``ruling``: the same election in plain numbers, where these can say it."""
    size, election = policy.size(scores), policy.election
    cap = election.cap(scores.slots)
    if scores.incumbents is None and cap is None and spares_nobody(size, election, k):
        return Ruling(scores)
    rule = rule_of(size, election, k, scores.router.experts, cap)
    if rule is None:
        return None
    if election.scope == "batch":
        if scores.incumbents is not None:
            return None
        scores = as_one_sequence(scores)
    everybody = election.voters == "all" and scores.voters is None
    if spares_nobody(size, election, k) and not everybody:
        if cap is not None:
            return None  # kernels have one voice for the union and the votes
        everybody = True
    return Ruling(scores, rule, None if everybody else voices(scores, election.voters))


@lru_cache(maxsize=256)  # the same few for every layer of every forward
def rule_of(
    size: Size | Union, election: Election, k: int, experts: int, cap: int | None = None
) -> Rule | None:
    """What ``elect`` does, in plain numbers; None for lots, other tallies and other sizes."""
    if isinstance(size, Union) and cap is None:
        return Rule(union=size.k)
    if election.tally != "plain" or election.vote == "random":
        return None
    rule = Rule(
        vote=election.vote,
        protect=1 if election.protect == "top1" else 0,
        lam=election.lam,
        eps=election.eps,
        most=cap or 0,
    )
    match size:
        case Union():
            return replace(rule, union=size.k, protect=0)
        case Fraction() | Fixed():
            count = min(size.reach(experts)[0], cap or experts)
            # Where nobody is protected, a smaller count says it all.
            return replace(rule, count=count, most=rule.most if rule.protect else 0)
        case Mass():
            return replace(rule, mass=size.tau, least=size.floor(experts, k))
        case _:
            return None


def spares_nobody(size: Size | Union, election: Election, k: int) -> bool:
    """Whether the union is of all that tokens have, those the engine does not let vote too."""
    return isinstance(size, Union) and size.k >= k and election.voters == "all"


def elect(scores: Scores, size: Size | Union, election: Election, k: int) -> Tensor:
    """The coreset as a mask [S, 1, E]; [1, 1, E] when all rows share one."""
    cap = election.cap(scores.slots)
    spared = spares_nobody(size, election, k)
    if spared and cap is None:
        return scores.logits.new_ones((1, 1, 1), dtype=torch.bool)
    if election.scope == "batch":
        scores = as_one_sequence(scores)
    voice = voices(scores, election.voters)
    if isinstance(size, Union):
        protected = first_choices(scores, torch.ones_like(voice) if spared else voice, size.k)
        if cap is None:
            return protected.unsqueeze(1)
        size = Fixed(0)
    else:
        protected = first_choices(scores, voice, 1 if election.protect == "top1" else 0)
    if election.tally == "proportional":
        ballots = BALLOTS[election.vote](scores)  # [S, N, E]
        favour = favour_of(scores, election)
        return take_in_turn(ballots, voice, protected, size, k, cap=cap, favour=favour).unsqueeze(1)
    votes = VOTES[election.vote](scores, voice, election.seed)  # [S, E]
    coreset = take(votes, protected, size, k, cap=cap)
    if election.lam > 0 and scores.resident is not None:
        liked = votes * (1 + election.lam * scores.resident.double())
        favoured = take(liked, protected, size, k, cap=cap)
        coreset = repaired(favoured, coreset, votes, election.eps)
    return coreset.unsqueeze(1)


def first_choices(scores: Scores, voice: Tensor, m: int) -> Tensor:
    """Mask [S, E]: the union over voters of the first ``m`` of their own experts."""
    ids = own(scores)[..., :m].masked_fill((voice <= 0).unsqueeze(-1), -1)
    return membership(ids.flatten(1), scores.router.experts)


def take(votes: Tensor, protected: Tensor, size: Size, k: int, *, cap: int | None = None) -> Tensor:
    """Mask [S, E]: the protected experts, then those with most votes until ``size`` is reached.

    Protected experts use up the budget; when they alone exceed it, they are the coreset, as
    far as the ``cap`` lets them.
    """
    order = top_ids(votes, votes.shape[-1], tier=~protected)
    return seated(order, votes.gather(-1, order), protected, size, k, cap=cap)


def favour_of(scores: Scores, election: Election) -> Favour | None:
    """What residency counts where seats are taken in turn; None where it counts nothing."""
    if election.lam == 0 or scores.resident is None:
        return None
    return Favour(scores.resident, election.lam, election.eps)


def take_in_turn(
    ballots: Tensor,
    voice: Tensor,
    protected: Tensor,
    size: Size,
    k: int,
    *,
    cap: int | None = None,
    favour: Favour | None = None,
) -> Tensor:
    """Mask [S, E]: the protected experts, then one by one, votes being tallied again for each."""
    most, worth = size.reach(protected.shape[-1])
    most = max(most, int(protected.sum(-1).max()))
    most = most if cap is None else min(most, cap)
    order, gains = seats(ballots, voice, protected, most=most, k=k, worth=worth, favour=favour)
    return seated(order, gains, protected, size, k, cap=cap)


def seated(
    order: Tensor, votes: Tensor, protected: Tensor, size: Size, k: int, *, cap: int | None = None
) -> Tensor:
    """Mask [S, E]: as many of ``order`` [S, m] as ``size`` says of their votes [S, m]."""
    experts, walked = protected.shape[-1], order.shape[-1]
    budget = size.count(F.pad(votes, (0, experts - walked)), k)
    budget = budget.maximum(protected.sum(dim=-1, keepdim=True))  # [S, 1]
    budget = budget if cap is None else budget.clamp(max=cap)
    place = torch.arange(walked, device=votes.device)
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
        own=joined(scores.own),
        forward=scores.forward[:1],
    )
