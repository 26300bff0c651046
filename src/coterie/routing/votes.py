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
from coterie.naming import CoterieError
from coterie.routing.select import UNIT, choose, own
from coterie.spelling import Spelt
from coterie.values import Progress, Scores, membership

Voters = Literal["all", "unfilled", "masked", "uncertain"]
Vote = Literal["masked", "weight", "count", "full", "margin", "max", "random"]

BEFORE_EOS = Spelt("unfilled", "before-eos")
TOPK_PROB = Spelt("masked", "topk-prob")

FLOOR = 2.0**-10


def voices(scores: Scores, voters: Voters) -> Tensor:
    """a[n], [S, N] fp32 >= 0: the engine's voters, narrowed by a policy's ``voters=``.

    Where that leaves a sequence without a voter, the engine's voters stand; without these too (a
    finished row), everybody votes, so that an election always has a result.
    """
    narrowing = None if voters == "all" else _narrowing(scores.progress, voters)
    if scores.voters is None and narrowing is None:
        return torch.ones(scores.logits.shape[:2], device=scores.logits.device)
    return ops.voices(scores.voters, narrowing, opposite=voters == "unfilled")


def masked(scores: Scores) -> Tensor:
    """The router's probability of each token's own experts (DES-Vote)."""
    return scores.probability * _own_mask(scores)


def weight(scores: Scores) -> Tensor:
    """Combine weights, renormalised whatever the family does: every token has one vote to split."""
    return _split(scores.weight * _own_mask(scores))


def count(scores: Scores) -> Tensor:
    """One vote for each of a token's own experts (the paper's naive variant)."""
    return _own_mask(scores).float()


def full(scores: Scores) -> Tensor:
    """The router's probability of every expert (XShare)."""
    return scores.probability


def margin(scores: Scores) -> Tensor:
    """How far each own expert ranks above the one that the token would take next, as a share.

    A trained gate's weights are nearly even among a token's own experts, while what these add to
    the output is not: the first adds several times what the last does. The margin tells them apart.
    """
    k = scores.router.k
    ids = choose(scores, None, k + 1)
    c = scores.rank.gather(-1, ids)
    # Above a small floor, so that a token whose margins are all nothing has a vote all the same.
    above = (c[..., :k] - c[..., -1:]).clamp(min=0) + FLOOR
    return _split(torch.zeros_like(scores.rank).scatter(-1, ids[..., :k], above))


def greatest(scores: Scores, voice: Tensor, seed: int) -> Tensor:
    """The best selection score that any voter gives (LLaDA2.2); a voice counts as yes or no."""
    silent = (voice <= 0).unsqueeze(-1)
    return _units(scores.rank.masked_fill(silent, -torch.inf).amax(dim=1))


def drawn(scores: Scores, voice: Tensor, seed: int) -> Tensor:
    """Votes from a seeded lot, which depend on the layer and the row's own forward number only."""
    rows = scores.logits.shape[0]
    forward = scores.forward or (0,) * rows
    lots = [
        random.Random(f"{seed}/{scores.layer}/{forward[row]}").choices(
            range(int(UNIT)), k=scores.router.experts
        )
        for row in range(rows)
    ]
    return torch.tensor(lots, device=scores.logits.device)


def _added_up(ballot: Callable[[Scores], Tensor]) -> Callable[[Scores, Tensor, int], Tensor]:
    return lambda scores, voice, seed: _units(ballot(scores) * voice.unsqueeze(-1)).sum(dim=1)


BALLOTS: dict[Vote, Callable[[Scores], Tensor]] = {  # v[n, i]: each gives [S, N, E]
    "masked": masked,
    "weight": weight,
    "count": count,
    "full": full,
    "margin": margin,
}

VOTES: dict[Vote, Callable[[Scores, Tensor, int], Tensor]] = {  # each gives [S, E] int64
    **{vote: _added_up(ballot) for vote, ballot in BALLOTS.items()},
    "max": greatest,
    "random": drawn,
}


def _narrowing(progress: Progress | None, voters: Voters) -> Tensor:
    """Whom it leaves a voice; of ``unfilled`` the opposite, as progress has it."""
    progress = progress or Progress()
    known = {
        "unfilled": progress.filled,
        "masked": progress.masked,
        "uncertain": progress.uncertainty,
    }[voters]
    if known is None:
        said = BEFORE_EOS.of(voters)
        raise CoterieError(f"voters={said} needs the canvas's progress, which was not given")
    return known


def _own_mask(scores: Scores) -> Tensor:
    return membership(own(scores), scores.router.experts)


def _split(values: Tensor) -> Tensor:
    """[..., E] >= 0 as shares of one vote; nothing stays nothing."""
    total = values.sum(dim=-1, keepdim=True)
    return values / total.where(total != 0, 1.0)


def _units(values: Tensor) -> Tensor:
    return (values * UNIT).round().to(torch.int64)
