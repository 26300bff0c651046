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

from coterie.naming import CoterieError
from coterie.routing.select import own
from coterie.values import Progress, Scores, membership

Voters = Literal["all", "unfilled", "masked", "uncertain"]
Vote = Literal["masked", "weight", "count", "full", "max", "random"]

UNIT = 2.0**40


def voices(scores: Scores, voters: Voters) -> Tensor:
    """a[n], [S, N] fp32 >= 0: the engine's voters, narrowed by a policy's ``voters=``.

    Where that leaves a sequence without a voter, the engine's voters stand; without these too (a
    finished row), everybody votes, so that an election always has a result.
    """
    everybody = torch.ones(scores.logits.shape[:2], device=scores.logits.device)
    allowed = everybody if scores.voters is None else scores.voters.to(everybody.dtype)
    narrowed = allowed if voters == "all" else allowed * _narrowing(scores.progress, voters)
    allowed = allowed.where((allowed > 0).any(dim=1, keepdim=True), everybody)
    return narrowed.where((narrowed > 0).any(dim=1, keepdim=True), allowed)


def masked(scores: Scores, voice: Tensor, seed: int) -> Tensor:
    """The router's probability of each token's own experts (DES-Vote)."""
    return _sum(scores.probability * _own_mask(scores), voice)


def weight(scores: Scores, voice: Tensor, seed: int) -> Tensor:
    """Combine weights, renormalised whatever the family does: every token has one vote to split."""
    weights = scores.weight * _own_mask(scores)
    total = weights.sum(dim=-1, keepdim=True)
    return _sum(weights / total.where(total != 0, 1.0), voice)


def count(scores: Scores, voice: Tensor, seed: int) -> Tensor:
    """One vote for each of a token's own experts (the paper's naive variant)."""
    return _sum(_own_mask(scores).float(), voice)


def full(scores: Scores, voice: Tensor, seed: int) -> Tensor:
    """The router's probability of every expert (XShare)."""
    return _sum(scores.probability, voice)


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


VOTES: dict[Vote, Callable[[Scores, Tensor, int], Tensor]] = {  # each gives [S, E] int64
    "masked": masked,
    "weight": weight,
    "count": count,
    "full": full,
    "max": greatest,
    "random": drawn,
}


def _narrowing(progress: Progress | None, voters: Voters) -> Tensor:
    progress = progress or Progress()
    known = {
        "unfilled": None if progress.filled is None else ~progress.filled,
        "masked": progress.masked,
        "uncertain": progress.uncertainty,
    }[voters]
    if known is None:
        raise CoterieError(f"voters={voters} needs the canvas's progress, which was not given")
    return known


def _own_mask(scores: Scores) -> Tensor:
    return membership(own(scores), scores.router.experts)


def _sum(values: Tensor, voice: Tensor) -> Tensor:
    return _units(values * voice.unsqueeze(-1)).sum(dim=1)


def _units(values: Tensor) -> Tensor:
    return (values * UNIT).round().to(torch.int64)
