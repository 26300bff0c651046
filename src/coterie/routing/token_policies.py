"""Policies in which every token decides for itself: the unmodified model and the baselines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from coterie.errors import CoterieError
from coterie.ops import top_ids, top_mask
from coterie.routing.router import KernelRouting, vanilla_ids
from coterie.specs import ALWAYS_PRINTED, PositiveInt, UnitFraction, check_options
from coterie.values import Scores, expert_mask


@dataclass(frozen=True)
class Vanilla:
    """The unmodified model."""

    def eligible(self, scores: Scores, k: int) -> Tensor:
        return scores.logits.new_ones((1, 1, 1), dtype=torch.bool)

    def kernel_rule(self, scores: Scores, k: int) -> KernelRouting:
        return KernelRouting(scores)


@dataclass(frozen=True)
class TopK:
    """The first ``k`` of every token's own experts."""

    k: PositiveInt

    __post_init__ = check_options

    def eligible(self, scores: Scores, k: int) -> Tensor:
        return expert_mask(vanilla_ids(scores)[..., : self.k], scores.router.experts)


@dataclass(frozen=True)
class Naee:
    """Drops the longest tail of a token's experts that holds less than ``beta`` of their
    probability, never the first (NAEE, arXiv 2402.14800)."""

    beta: UnitFraction

    __post_init__ = check_options

    def eligible(self, scores: Scores, k: int) -> Tensor:
        return mask_without_tail(scores, self.beta)


@dataclass(frozen=True)
class McMoe:
    """As NAEE, but the share ``protect`` of tokens with most importance keeps all of its experts
    (MC-MoE, arXiv 2410.06270). The share is rounded up: any ``protect`` > 0 protects a token."""

    beta: UnitFraction
    protect: Annotated[UnitFraction, ALWAYS_PRINTED] = 0.02

    __post_init__ = check_options

    def eligible(self, scores: Scores, k: int) -> Tensor:
        if scores.importance is None:
            raise CoterieError("mc-moe needs the importance of each token, and none was given")
        count = math.ceil(self.protect * scores.importance.shape[-1] - 1e-9)
        important = top_mask(scores.importance, count).unsqueeze(-1)  # [S, N, 1]
        return mask_without_tail(scores, self.beta) | (
            important & expert_mask(vanilla_ids(scores), scores.router.experts)
        )


def mask_without_tail(scores: Scores, beta: float) -> Tensor:
    """Mask [S, N, E] of every token's own experts less their tail (by probability) below beta."""
    experts = scores.router.experts
    vanilla_mask = expert_mask(vanilla_ids(scores), experts)
    ids = top_ids(scores.probability.masked_fill(~vanilla_mask, -1.0), scores.router.k)
    p = scores.probability.gather(-1, ids)
    tail = p.flip(-1).cumsum(-1).flip(-1)  # [S, N, k]: p[i] + .. + p[k-1]
    keep = tail >= beta * tail[..., :1]
    return expert_mask(ids.where(keep, -1), experts)
