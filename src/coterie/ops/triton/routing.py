"""Routing on a GPU: two launches for any rule, without synchronising with the host.

A router with a capacity takes one more, for the experts that blocks admit.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from coterie.ops.triton.admission import admit_kernel
from coterie.ops.triton.election import choose_kernel, vote_kernel
from coterie.ops.triton.launch import ceil_div, launch, next_power_of_two
from coterie.values import CoresetRule, RouterSpec, Routing, Scores

MAX_COLUMNS = 1024  # columns of a program: the largest number of experts


def route(scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None) -> Routing | None:
    """See ``ops.route``. Non-finite logits give NaN weights."""
    if not supports(scores, rule):
        return None
    rows, tokens, experts = scores.logits.shape
    if rule is None and not scores.router.capacity:  # sequences do not matter
        rows, tokens = 1, rows * tokens
    config = launch_config(scores.router, tokens, rule is not None)
    empty = scores.logits.new_empty
    shape = (rows * tokens, scores.router.k)
    vanilla_ids = empty(shape, dtype=torch.int64)
    weights = empty(shape)
    used = empty(experts, dtype=torch.bool)
    p_bits = empty((rows, tokens, experts), dtype=torch.int32)
    vote_kind, mark_count = _vote_kind(rule), _marked_choices(rule)
    vote_sums = empty((rows, config.tiles, experts), dtype=torch.int64) if vote_kind else None
    marks = empty((rows, config.tiles, experts), dtype=torch.int32) if mark_count else None
    ids = vanilla_ids if rule is None else torch.empty_like(vanilla_ids)
    bias = None if scores.bias is None else scores.bias.contiguous()
    logits = scores.logits.contiguous()
    starts = None if scores.starts is None else scores.starts.contiguous()
    admitted = _admit(scores, logits, bias, starts) if scores.router.capacity else None
    blocks = 0 if admitted is None else admitted.shape[1]
    launch(
        vote_kernel,
        (config.tiles, rows),
        logits,
        bias,
        None if vote_weight is None else vote_weight.contiguous(),
        starts,
        admitted,
        p_bits,
        vanilla_ids,
        vote_sums,
        marks,
        used.view(torch.uint8),
        tokens,
        blocks,
        VOTE=vote_kind,
        MARKS=mark_count,
        SIGMOID=scores.router.activation == "sigmoid",
        BIASED=scores.router.biased_weight and bias is not None,
        TOKENS=config.vote_tokens,
        num_warps=config.vote_warps,
        BLOCK=scores.router.block,
        **config.constants,
    )
    resident = scores.resident if rule is not None and rule.resident_bonus > 0 else None
    launch(
        choose_kernel,
        (ceil_div(tokens, config.choose_tokens), rows),
        logits,
        admitted,
        p_bits,
        vanilla_ids,
        vote_sums,
        marks,
        used.view(torch.uint8),
        bias,
        None if resident is None else resident.view(torch.uint8),
        ids,
        weights,
        tokens,
        config.tiles,
        blocks,
        *_rule_numbers(rule),
        RULE=_size_kind(rule),
        BEST=vote_kind == "max",
        PROTECT=mark_count > 0,
        RENORMALISE=scores.router.renormalise,
        SCALE=scores.router.scale,
        EPSILON=scores.router.epsilon,
        BIASED=scores.router.biased_weight and bias is not None,
        TOKENS=config.choose_tokens,
        num_warps=4,
        **config.constants,
    )
    return Routing(topk_ids=ids, topk_weights=weights, used=used, vanilla_ids=vanilla_ids)


def supports(scores: Scores, rule: CoresetRule | None) -> bool:
    """Whether the kernels support these scores and this rule."""
    router, logits = scores.router, scores.logits
    has_maximum = rule is not None and rule.max_experts > 0
    if has_maximum or scores.previous_coresets is not None:
        return False
    if logits.numel() == 0 or logits.requires_grad:
        return False
    if any(x is not None and x.dtype != torch.float32 for x in (logits, scores.bias)):
        return False
    if logits.numel() >= 2**31 or router.k > router.experts or router.experts % router.groups:
        return False
    is_limited = router.capacity > 0 or (rule is not None and rule.protect > 0)
    if rule is not None and rule.vote == "max" and rule.mass > 0 and is_limited:
        # Votes may be negative here, and their sums depend on an order that the kernel drops.
        return False
    constants = _column_constants(router)
    return constants["PADDED_GROUPS"] * constants["PADDED_SIZE"] <= MAX_COLUMNS


def _admit(scores: Scores, logits: Tensor, bias: Tensor | None, starts: Tensor | None) -> Tensor:
    """[S, blocks, E] int32: the experts that each block of a row admits."""
    (rows, tokens, experts), router = logits.shape, scores.router
    blocks = (tokens + router.block - 2) // router.block + 1
    admitted = logits.new_empty((rows, blocks, experts), dtype=torch.int32)
    launch(
        admit_kernel,
        (blocks, rows),
        logits,
        bias,
        starts,
        admitted,
        tokens,
        SIGMOID=router.activation == "sigmoid",
        CAPACITY=router.capacity,
        BLOCK=router.block,
        EXPERTS=experts,
        COLUMNS=next_power_of_two(experts),
        TOKENS=min(8, next_power_of_two(router.block)),
        num_warps=4,
    )
    return admitted


@dataclass(frozen=True)
class RouteLaunch:
    """The grid of both launches; ``constants`` are the kernel constants that they share."""

    vote_tokens: int  # tokens per program of the first launch
    vote_warps: int  # warps per program of the first launch
    choose_tokens: int  # tokens per program of the second launch
    tiles: int  # programs per sequence of the first launch
    constants: dict[str, int]


@lru_cache(maxsize=1024)
def launch_config(router: RouterSpec, tokens: int, has_rule: bool) -> RouteLaunch:
    """The grid for a router and ``tokens`` per sequence.

    One warp for two tokens keeps reductions inside the warp. Many tokens use larger tiles, so that
    the second launch has fewer tiles to add up.
    """
    constants = _column_constants(router)
    width = constants["PADDED_GROUPS"] * constants["PADDED_SIZE"]
    few = tokens <= 64 and width <= 512
    vote_tokens, warps = (2, 1) if few else (8, 4)
    return RouteLaunch(
        vote_tokens=vote_tokens,
        vote_warps=warps,
        choose_tokens=4 if has_rule else 32,
        tiles=ceil_div(tokens, vote_tokens),
        constants=constants,
    )


@lru_cache(maxsize=64)
def _column_constants(router: RouterSpec) -> dict[str, int]:
    has_group_limit = router.topk_groups < router.groups
    groups = router.groups if has_group_limit else 1
    size = router.experts // groups
    kept = router.topk_groups * size if has_group_limit else router.experts
    return {
        "EXPERTS": router.experts,
        "K": router.k,
        "GROUPS": groups,
        "TOPK_GROUPS": router.topk_groups if has_group_limit else 1,
        "PADDED_GROUPS": next_power_of_two(groups),
        "GROUP_SIZE": size,
        "PADDED_SIZE": next_power_of_two(size),
        "CHOICES": next_power_of_two(router.k),
        "KEPT": router.capacity or kept,
    }


def _vote_kind(rule: CoresetRule | None) -> str:
    return "" if rule is None or rule.union > 0 else rule.vote


def _marked_choices(rule: CoresetRule | None) -> int:
    return 0 if rule is None else rule.union or rule.protect


def _size_kind(rule: CoresetRule | None) -> str:
    if rule is None:
        return "none"
    if rule.union > 0:
        return "union"
    return "mass" if rule.mass > 0 else "count"


@lru_cache(maxsize=1024)
def _rule_numbers(rule: CoresetRule | None) -> tuple[int, int, int, int, int]:
    """count, min_experts, then mass, resident_bonus and max_vote_loss as the bits of doubles.

    Bits, because Triton passes float arguments in single precision.
    """
    numbers = rule or CoresetRule(union=1)  # no rule reads no number
    doubles = struct.pack("ddd", numbers.mass, numbers.resident_bonus, numbers.max_vote_loss)
    return numbers.count, numbers.min_experts, *struct.unpack("qqq", doubles)
