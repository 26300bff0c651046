"""Policies that choose experts for each token alone: the unmodified model and the baselines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from coterie.errors import ConfigError
from coterie.ops import top_ids, top_mask
from coterie.routing.router import KernelRouting, vanilla_ids
from coterie.specs import ALWAYS_PRINTED, PositiveInt, UnitFraction, check_options
from coterie.values import Scores, expert_mask


@dataclass(frozen=True)
class Vanilla:
    """Each token uses its own top-k experts: the unmodified model."""

    def eligible(self, scores: Scores, k: int) -> Tensor:
        return scores.logits.new_ones((1, 1, 1), dtype=torch.bool)

    def kernel_rule(self, scores: Scores, k: int) -> KernelRouting:
        return KernelRouting(scores)


@dataclass(frozen=True)
class TopK:
    """Each token uses only the first ``k`` of its own experts."""

    k: PositiveInt

    __post_init__ = check_options

    def eligible(self, scores: Scores, k: int) -> Tensor:
        return expert_mask(vanilla_ids(scores)[..., : self.k], scores.router.experts)


@dataclass(frozen=True)
class Naee:
    """Each token drops its weakest experts as long as they hold less than the share ``beta`` of its
    top-k probability (NAEE, arXiv 2402.14800)."""

    beta: UnitFraction

    __post_init__ = check_options

    def eligible(self, scores: Scores, k: int) -> Tensor:
        return mask_without_tail(scores, self.beta)


@dataclass(frozen=True)
class McMoe:
    """Tokens drop experts as under ``naee``, but the share ``protect`` of tokens with the highest
    importance, rounded up, keeps all of its experts (MC-MoE, arXiv 2410.06270)."""

    beta: UnitFraction
    protect: Annotated[UnitFraction, ALWAYS_PRINTED] = 0.02

    __post_init__ = check_options

    def eligible(self, scores: Scores, k: int) -> Tensor:
        if scores.importance is None:
            raise ConfigError("mc-moe needs the importance of each token; set `Scores.importance`")
        count = math.ceil(self.protect * scores.importance.shape[-1] - 1e-9)
        important = top_mask(scores.importance, count).unsqueeze(-1)  # [S, N, 1]
        return mask_without_tail(scores, self.beta) | (
            important & expert_mask(vanilla_ids(scores), scores.router.experts)
        )


def mask_without_tail(scores: Scores, beta: float) -> Tensor:
    """Mask [S, N, E] of each token's own experts without its tail.

    The tail is the longest run of the least probable ones with less than ``beta`` of their sum.
    """
    experts = scores.router.experts
    vanilla_mask = expert_mask(vanilla_ids(scores), experts)
    ids = top_ids(scores.probability.masked_fill(~vanilla_mask, -1.0), scores.router.k)
    p = scores.probability.gather(-1, ids)
    tail = p.flip(-1).cumsum(-1).flip(-1)  # [S, N, k]: p[i] + .. + p[k-1]
    keep = tail >= beta * tail[..., :1]
    return expert_mask(ids.where(keep, -1), experts)
