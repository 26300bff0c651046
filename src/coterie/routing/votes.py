"""Votes of tokens for experts: V[i] = sum over n of a[n] * v[n, i] (DES, Eq. 6).

Votes are integers in units of 2**-40, so their sum is exact in any order: the same tokens elect the
same experts in another order and on another device.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from coterie import ops
from coterie.errors import ConfigError
from coterie.routing.router import VOTE_UNIT, select_topk, vanilla_ids
from coterie.specs import ValueAlias
from coterie.values import DecodeProgress, Scores, expert_mask

Voters = Literal["all", "before-eos", "masked", "uncertain"]
Vote = Literal["topk-prob", "weight", "count", "full", "margin", "max", "random"]

VOTERS_ALIAS = ValueAlias("unfilled", "before-eos")
VOTE_ALIAS = ValueAlias("masked", "topk-prob")

MARGIN_FLOOR = 2.0**-10


def vote_weights(scores: Scores, voters: Voters) -> Tensor:
    """a[n], [S, N] fp32 >= 0: the engine's voters, narrowed by a policy's ``voters=``.

    A row that would have no voter keeps the engine's voters. If it has none of these either (a
    finished row), all of its tokens vote, so an election always has a result.
    """
    voter_mask = None if voters == "all" else _voter_mask(scores.progress, voters)
    if scores.voters is None and voter_mask is None:
        return torch.ones(scores.logits.shape[:2], device=scores.logits.device)
    return ops.vote_weights(scores.voters, voter_mask, invert_filter=voters == "before-eos")


def topk_probability(scores: Scores) -> Tensor:
    """The router's probability of each token's own experts (DES-Vote)."""
    return scores.probability * _vanilla_mask(scores)


def topk_weight(scores: Scores) -> Tensor:
    """Combine weights, always renormalised: every token splits one vote."""
    return _normalise(scores.gate_weights * _vanilla_mask(scores))


def topk_count(scores: Scores) -> Tensor:
    """One vote for each of a token's own experts (the paper's naive variant)."""
    return _vanilla_mask(scores).float()


def full_probability(scores: Scores) -> Tensor:
    """The router's probability of every expert (XShare)."""
    return scores.probability


def topk_margin(scores: Scores) -> Tensor:
    """The margin of each own expert over the token's next best expert, as a share of one vote.

    A trained router's weights are nearly even among a token's own experts, but the first expert
    contributes several times as much to the output as the last. The margin reflects that.
    """
    k = scores.router.k
    ids = select_topk(scores, None, k + 1)
    topk_scores = scores.selection_scores.gather(-1, ids)
    # A small floor gives a token a vote even if all its margins are 0.
    margins = (topk_scores[..., :k] - topk_scores[..., -1:]).clamp(min=0) + MARGIN_FLOOR
    return _normalise(torch.zeros_like(scores.selection_scores).scatter(-1, ids[..., :k], margins))


def max_score(scores: Scores, vote_weight: Tensor, seed: int) -> Tensor:
    """The best selection score of any voter (LLaDA2.2); a vote weight > 0 counts fully."""
    cannot_vote = (vote_weight <= 0).unsqueeze(-1)
    return _to_units(scores.selection_scores.masked_fill(cannot_vote, -torch.inf).amax(dim=1))


def random_votes(scores: Scores, vote_weight: Tensor, seed: int) -> Tensor:
    """Seeded random votes, which depend only on the layer and the row's own forward number."""
    rows = scores.logits.shape[0]
    forward = scores.forward_indices or (0,) * rows
    draws = [
        random.Random(f"{seed}/{scores.layer}/{forward[row]}").choices(
            range(int(VOTE_UNIT)), k=scores.router.experts
        )
        for row in range(rows)
    ]
    return torch.tensor(draws, device=scores.logits.device)


def _sum_over_voters(ballot: Callable[[Scores], Tensor]) -> Callable[[Scores, Tensor, int], Tensor]:
    return lambda scores, vote_weight, seed: _to_units(
        ballot(scores) * vote_weight.unsqueeze(-1)
    ).sum(dim=1)


BALLOTS: dict[Vote, Callable[[Scores], Tensor]] = {  # v[n, i]: each gives [S, N, E]
    "topk-prob": topk_probability,
    "weight": topk_weight,
    "count": topk_count,
    "full": full_probability,
    "margin": topk_margin,
}

VOTES: dict[Vote, Callable[[Scores, Tensor, int], Tensor]] = {  # each gives [S, E] int64
    **{vote: _sum_over_voters(ballot) for vote, ballot in BALLOTS.items()},
    "max": max_score,
    "random": random_votes,
}


def _voter_mask(progress: DecodeProgress | None, voters: Voters) -> Tensor:
    """[S, N] where > 0 means a voter; for ``before-eos`` it means no voter."""
    progress = progress or DecodeProgress()
    mask = {
        "before-eos": progress.after_eos,
        "masked": progress.masked,
        "uncertain": progress.uncertainty,
    }[voters]
    if mask is None:
        raise ConfigError(f"voters={voters} needs the decoding progress; set `Scores.progress`")
    return mask


def _vanilla_mask(scores: Scores) -> Tensor:
    return expert_mask(vanilla_ids(scores), scores.router.experts)


def _normalise(values: Tensor) -> Tensor:
    """[..., E] >= 0 as shares of one vote; a row of zeros stays zero."""
    total = values.sum(dim=-1, keepdim=True)
    return values / total.where(total != 0, 1.0)


def _to_units(values: Tensor) -> Tensor:
    return (values * VOTE_UNIT).round().to(torch.int64)
