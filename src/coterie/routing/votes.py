"""Who votes, and for whom: V[i] = sum over n of a[n] * v[n, i] (DES, Eq. 6).

Votes are whole numbers in units of 2**-40, so that their sum is exact and the same in any order:
the same tokens in another order, on another device, elect the same experts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from coterie import ops
from coterie.errors import CoterieError
from coterie.routing.router import VOTE_UNIT, select_topk, vanilla_ids
from coterie.specs import ValueAlias
from coterie.values import DecodeProgress, Scores, expert_mask

Voters = Literal["all", "unfilled", "masked", "uncertain"]
Vote = Literal["masked", "weight", "count", "full", "margin", "max", "random"]

BEFORE_EOS = ValueAlias("unfilled", "before-eos")
TOPK_PROB = ValueAlias("masked", "topk-prob")

MARGIN_FLOOR = 2.0**-10


def vote_weights(scores: Scores, voters: Voters) -> Tensor:
    """a[n], [S, N] fp32 >= 0: the engine's voters, narrowed by a policy's ``voters=``.

    Where that leaves a sequence without a voter, the engine's voters stand; without these too (a
    finished row), everybody votes, so that an election always has a result.
    """
    voter_mask = None if voters == "all" else _voter_mask(scores.progress, voters)
    if scores.voters is None and voter_mask is None:
        return torch.ones(scores.logits.shape[:2], device=scores.logits.device)
    return ops.vote_weights(scores.voters, voter_mask, invert_filter=voters == "unfilled")


def topk_probability(scores: Scores) -> Tensor:
    """The router's probability of each token's own experts (DES-Vote)."""
    return scores.probability * _vanilla_mask(scores)


def topk_weight(scores: Scores) -> Tensor:
    """Combine weights, renormalised whatever the family does: every token has one vote to split."""
    return _normalise(scores.gate_weights * _vanilla_mask(scores))


def topk_count(scores: Scores) -> Tensor:
    """One vote for each of a token's own experts (the paper's naive variant)."""
    return _vanilla_mask(scores).float()


def full_probability(scores: Scores) -> Tensor:
    """The router's probability of every expert (XShare)."""
    return scores.probability


def topk_margin(scores: Scores) -> Tensor:
    """How far each own expert ranks above the one that the token would take next, as a share.

    A trained gate's weights are nearly even among a token's own experts, while what these add to
    the output is not: the first adds several times what the last does. The margin tells them apart.
    """
    k = scores.router.k
    ids = select_topk(scores, None, k + 1)
    topk_scores = scores.selection_scores.gather(-1, ids)
    # Above a small floor, so that a token whose margins are all nothing has a vote all the same.
    margins = (topk_scores[..., :k] - topk_scores[..., -1:]).clamp(min=0) + MARGIN_FLOOR
    return _normalise(torch.zeros_like(scores.selection_scores).scatter(-1, ids[..., :k], margins))


def max_score(scores: Scores, vote_weight: Tensor, seed: int) -> Tensor:
    """The best selection score that any voter gives (LLaDA2.2); a voice counts as yes or no."""
    cannot_vote = (vote_weight <= 0).unsqueeze(-1)
    return _to_units(scores.selection_scores.masked_fill(cannot_vote, -torch.inf).amax(dim=1))


def random_votes(scores: Scores, vote_weight: Tensor, seed: int) -> Tensor:
    """Votes from a seeded lot, which depend on the layer and the row's own forward number only."""
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
    return lambda scores, voice, seed: _to_units(ballot(scores) * voice.unsqueeze(-1)).sum(dim=1)


BALLOTS: dict[Vote, Callable[[Scores], Tensor]] = {  # v[n, i]: each gives [S, N, E]
    "masked": topk_probability,
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
    """Whom it leaves a voice; of ``unfilled`` the opposite, as progress has it."""
    progress = progress or DecodeProgress()
    mask = {
        "unfilled": progress.after_eos,
        "masked": progress.masked,
        "uncertain": progress.uncertainty,
    }[voters]
    if mask is None:
        voters_text = BEFORE_EOS.of(voters)
        raise CoterieError(f"voters={voters_text} needs the canvas's progress, which was not given")
    return mask


def _vanilla_mask(scores: Scores) -> Tensor:
    return expert_mask(vanilla_ids(scores), scores.router.experts)


def _normalise(values: Tensor) -> Tensor:
    """[..., E] >= 0 as shares of one vote; nothing stays nothing."""
    total = values.sum(dim=-1, keepdim=True)
    return values / total.where(total != 0, 1.0)


def _to_units(values: Tensor) -> Tensor:
    return (values * VOTE_UNIT).round().to(torch.int64)
