"""Routing on a GPU: two launches, whatever the rule, and the host is never waited for."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from coterie.ops.triton.election import serve, vote
from coterie.ops.triton.launch import launch, pieces, power_of_two
from coterie.values import RouterSpec, Routing, Rule, Scores

WIDEST = 1024  # columns that a program holds, and so experts


def route(scores: Scores, rule: Rule | None, voice: Tensor | None) -> Routing | None:
    """See ``ops.route``. Logits that are no numbers give weights that are none."""
    if not fits(scores, rule):
        return None
    rows, tokens, experts = scores.logits.shape
    if rule is None:  # nobody asks which tokens belong together
        rows, tokens = 1, rows * tokens
    plan = plan_of(scores.router, tokens, rule is not None)
    new = scores.logits.new_empty
    shape = (rows * tokens, scores.router.k)
    own = new(shape, dtype=torch.int64)
    weights = new(shape)
    used = new(experts, dtype=torch.bool)
    bits = new((rows, tokens, experts), dtype=torch.int32)
    counts, marked = _votes(rule), _marks(rule)
    parts = new((rows, plan.tiles, experts), dtype=torch.int64) if counts else None
    marks = new((rows, plan.tiles, experts), dtype=torch.int32) if marked else None
    ids = own if rule is None else torch.empty_like(own)
    bias = None if scores.bias is None else scores.bias.contiguous()
    launch(
        vote,
        (plan.tiles, rows),
        scores.logits.contiguous(),
        bias,
        None if voice is None else voice.contiguous(),
        bits,
        own,
        parts,
        marks,
        used.view(torch.uint8),
        tokens,
        VOTE=counts,
        MARKS=marked,
        SIGMOID=scores.router.activation == "sigmoid",
        BIASED=scores.router.biased_weight and bias is not None,
        TOKENS=plan.casting,
        num_warps=plan.warps,
        **plan.columns,
    )
    resident = scores.resident if rule is not None and rule.lam > 0 else None
    launch(
        serve,
        (pieces(tokens, plan.serving), rows),
        bits,
        own,
        parts,
        marks,
        used.view(torch.uint8),
        bias,
        None if resident is None else resident.view(torch.uint8),
        ids,
        weights,
        tokens,
        plan.tiles,
        *_numbers(rule),
        RULE=_size(rule),
        BEST=counts == "max",
        PROTECT=marked > 0,
        RENORMALISE=scores.router.renormalise,
        SCALE=scores.router.scale,
        EPSILON=scores.router.epsilon,
        BIASED=scores.router.biased_weight and bias is not None,
        TOKENS=plan.serving,
        num_warps=4,
        **plan.columns,
    )
    return Routing(ids=ids, weights=weights, used=used, own=own)


def fits(scores: Scores, rule: Rule | None) -> bool:
    """Whether the kernels take these scores and this rule."""
    router, logits = scores.router, scores.logits
    if scores.incumbents is not None or (rule is not None and rule.most > 0):
        return False
    if logits.numel() == 0 or logits.requires_grad:
        return False
    if any(x is not None and x.dtype != torch.float32 for x in (logits, scores.bias)):
        return False
    if logits.numel() >= 2**31 or router.k > router.experts or router.experts % router.groups:
        return False
    if rule is not None and rule.vote == "max" and rule.mass > 0 and rule.protect > 0:
        return False  # sums of votes that may be negative, in an order that the kernel forgets
    return _columns(router)["MANY"] * _columns(router)["WIDE"] <= WIDEST


@dataclass(frozen=True)
class Plan:
    """How a router's work is cut up; ``columns`` are the constants that both kernels share."""

    casting: int  # tokens of a program of the first launch
    warps: int  # of such a program
    serving: int  # tokens of a program of the second
    tiles: int  # programs of a row in the first launch
    columns: dict[str, int]


@lru_cache(maxsize=1024)
def plan_of(router: RouterSpec, tokens: int, elects: bool) -> Plan:
    """One warp for two tokens keeps a maximum inside the warp; many tokens share more of them,
    so that the second launch has fewer parts to add up."""
    columns = _columns(router)
    width = columns["MANY"] * columns["WIDE"]
    few = tokens <= 64 and width <= 512
    casting, warps = (2, 1) if few else (8, 4)
    return Plan(
        casting=casting,
        warps=warps,
        serving=4 if elects else 32,
        tiles=pieces(tokens, casting),
        columns=columns,
    )


@lru_cache(maxsize=64)
def _columns(router: RouterSpec) -> dict[str, int]:
    limited = router.kept_groups < router.groups
    groups = router.groups if limited else 1
    size = router.experts // groups
    return {
        "EXPERTS": router.experts,
        "K": router.k,
        "GROUPS": groups,
        "KEPT": router.kept_groups if limited else 1,
        "MANY": power_of_two(groups),
        "SIZE": size,
        "WIDE": power_of_two(size),
        "CHOICES": power_of_two(router.k),
    }


def _votes(rule: Rule | None) -> str:
    return "" if rule is None or rule.union > 0 else rule.vote


def _marks(rule: Rule | None) -> int:
    return 0 if rule is None else rule.union or rule.protect


def _size(rule: Rule | None) -> str:
    if rule is None:
        return "none"
    if rule.union > 0:
        return "union"
    return "mass" if rule.mass > 0 else "count"


@lru_cache(maxsize=1024)
def _numbers(rule: Rule | None) -> tuple[int, int, int, int, int]:
    """Seats, seats at least; share of votes, lam and eps as the bits of doubles: a kernel would
    take a float in single precision."""
    told = rule or Rule()
    doubles = struct.pack("ddd", told.mass, told.lam, told.eps)
    return told.count, told.least, *struct.unpack("qqq", doubles)
