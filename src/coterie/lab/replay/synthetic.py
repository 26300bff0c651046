"""Traces of a model that is not at hand: routing drawn with its sizes, its spread, its memory.

A router's logit is the sum of three normal parts: one that an expert always has (``always``, a
share of the variance), one that it has in a block (``block``), and the token's own, which after a
step is what it was by the correlation ``steady``. Shared parts make tokens agree, so that fewer
experts are used; ``calibrated`` finds the three from three figures that can be read off any run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from coterie.errors import CoterieError
from coterie.keys import Key, to_json
from coterie.lab.replay.bit_packing import Mask
from coterie.lab.replay.trace import Trace, TraceForward, TraceHeader

LOGIT_STD, LOGIT_MEAN = 1.5, -2.0  # of the logits, before a sigmoid
BISECTION_STEPS = 16  # of a bisection
CALIBRATION_SIZES = (8, 6)  # layers and blocks that a calibration draws


@dataclass(frozen=True)
class SyntheticShape:
    """Sizes of what is drawn."""

    layers: int
    experts: int
    k: int
    tokens: int = 32
    steps: int = 8  # forwards of a block; each unmasks as many tokens
    expert_bytes: tuple[tuple[str, int], ...] = ()


LLADA2_MINI = SyntheticShape(
    layers=19,
    experts=256,
    k=8,
    expert_bytes=(("bf16", 6_291_456), ("int8", 3_244_032), ("int4", 1_769_472)),
)
"""LLaDA2.0-mini's; whole numbers of 8 and 4 bits with a bf16 scale for 64 and 32 of them."""


@dataclass(frozen=True)
class RoutingStats:
    """Three figures of a run under vanilla: experts that a forward uses in a layer, and the share
    of one forward's that the next uses too, in one block and from block to block."""

    unique: Annotated[float, Key("unique")]
    step_overlap: Annotated[float, Key("step_overlap")]
    block_overlap: Annotated[float, Key("block_overlap")]


@dataclass(frozen=True)
class RoutingLaw:
    """Shares of variance, and the correlation of a token's own part from step to step."""

    expert_variance: Annotated[float, Key("always")]
    block_variance: Annotated[float, Key("block")]
    step_correlation: Annotated[float, Key("steady")]


def synthetic_trace(shape: SyntheticShape, law: RoutingLaw, *, blocks: int, seed: int = 0) -> Trace:
    """One long row of so many blocks."""
    rng = np.random.default_rng(seed)
    forwards = tuple(_draw_forwards(shape, law, blocks, rng))
    header = TraceHeader(
        model=f"drawn: {shape.layers} layers of {shape.experts} experts, {shape.k} a token",
        policy="vanilla",
        plan="",
        unmask="",
        layers=tuple(range(1, shape.layers + 1)),
        experts=shape.experts,
        k=shape.k,
        expert_bytes=dict(shape.expert_bytes),
        provenance={"seed": seed, "blocks": blocks, "steps": shape.steps, **to_json(law)},
    )
    return Trace(header, None, forwards)


def routing_stats(trace: Trace) -> RoutingStats:
    """The three figures, of a trace of one row or more.

    Raises CoterieError where no block has two forwards, or no row two blocks.
    """
    vanilla_masks = [forward.vanilla_mask for forward in trace.forwards]
    decode = [index for index, record in enumerate(trace.forwards) if record.kind == "decode"]
    last_of_row: dict[int, int] = {}
    overlaps: dict[bool, list[float]] = {True: [], False: []}
    for index in decode:
        forward = trace.forwards[index]
        previous = last_of_row.get(forward.row)
        if previous is not None:
            same_block = trace.forwards[previous].block_start == forward.block_start
            overlaps[same_block].append(
                float(
                    (
                        (vanilla_masks[previous] & vanilla_masks[index]).sum(-1)
                        / vanilla_masks[previous].sum(-1)
                    ).mean()
                )
            )
        last_of_row[forward.row] = index
    if not overlaps[True] or not overlaps[False]:
        raise CoterieError("a trace needs blocks of several forwards and rows of several blocks")
    return RoutingStats(
        float(np.mean([vanilla_masks[index].sum(-1).mean() for index in decode])),
        float(np.mean(overlaps[True])),
        float(np.mean(overlaps[False])),
    )


def rescale_stats(
    stats: RoutingStats, experts: int, unique: float, target_experts: int
) -> RoutingStats:
    """The look of a model with ``others`` experts of which a forward uses ``unique``: overlaps
    keep their place between what chance gives and all."""

    def above_chance(share: float) -> float:
        chance = stats.unique / experts
        return max(0.0, (share - chance) / (1 - chance))

    target_chance = unique / target_experts
    steps, blocks = (
        target_chance + above_chance(share) * (1 - target_chance)
        for share in (stats.step_overlap, stats.block_overlap)
    )
    return RoutingStats(unique, steps, blocks)


def calibrate_law(shape: SyntheticShape, target: RoutingStats, *, seed: int = 1) -> RoutingLaw:
    """The law under which drawn routing looks so, by bisection: each figure has its parameter."""
    small_shape = replace(shape, layers=CALIBRATION_SIZES[0])

    def stats_of(law: RoutingLaw) -> RoutingStats:
        return routing_stats(
            synthetic_trace(small_shape, law, blocks=CALIBRATION_SIZES[1], seed=seed)
        )

    law = RoutingLaw(0.0, 0.5, 0.5)
    for _ in range(3):
        shared_variance = _bisect(
            lambda x, law=law: -stats_of(_with_shared_variance(law, x)).unique, -target.unique
        )
        law = _with_shared_variance(law, shared_variance)
        expert_part = _bisect(
            lambda x, law=law: stats_of(_with_expert_variance(law, x)).block_overlap,
            target.block_overlap,
        )
        law = _with_expert_variance(law, expert_part)
        step_correlation = _bisect(
            lambda x, law=law: stats_of(replace(law, step_correlation=x)).step_overlap,
            target.step_overlap,
        )
        law = replace(law, step_correlation=step_correlation)
    return law


def _with_shared_variance(law: RoutingLaw, share: float) -> RoutingLaw:
    total = max(law.expert_variance + law.block_variance, 1e-9)
    return replace(
        law,
        expert_variance=share * law.expert_variance / total,
        block_variance=share * law.block_variance / total,
    )


def _with_expert_variance(law: RoutingLaw, part: float) -> RoutingLaw:
    total = law.expert_variance + law.block_variance
    return replace(law, expert_variance=part * total, block_variance=(1 - part) * total)


def _bisect(increasing: Callable[[float], float], target: float) -> float:
    """x in [0, 1] where ``rising`` comes nearest to ``wanted``."""
    low, high = 0.0, 1.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < target else (low, middle)
    return (low + high) / 2


def _draw_forwards(
    shape: SyntheticShape, law: RoutingLaw, blocks: int, rng: np.random.Generator
) -> Iterator[TraceForward]:
    tokens, experts = shape.tokens, shape.experts
    token_variance = max(0.0, 1 - law.expert_variance - law.block_variance)
    expert_part = rng.standard_normal((shape.layers, 1, experts)) * law.expert_variance**0.5
    number = 0
    for block in range(blocks):
        block_part = (
            expert_part + rng.standard_normal((shape.layers, 1, experts)) * law.block_variance**0.5
        )
        token_part = rng.standard_normal((shape.layers, tokens, experts))
        order = rng.permutation(tokens)
        for step in range(shape.steps):
            masked = np.zeros(tokens, dtype=bool)
            masked[order[step * tokens // shape.steps :]] = True
            logits = LOGIT_STD * (block_part + token_part * token_variance**0.5) + LOGIT_MEAN
            yield _draw_forward(shape, logits, masked, number, block)
            noise = rng.standard_normal(token_part.shape)
            token_part = (
                law.step_correlation * token_part + (1 - law.step_correlation**2) ** 0.5 * noise
            )
            number += 1


def _draw_forward(
    shape: SyntheticShape, logits: NDArray[np.float64], masked: Mask, number: int, block: int
) -> TraceForward:
    p = (1 / (1 + np.exp(-logits))).astype(np.float32)
    order = np.argpartition(-p, shape.k, axis=-1)[..., : shape.k + 1]
    best = np.take_along_axis(order, np.argsort(-np.take_along_axis(p, order, -1), -1), -1)
    rank = np.take_along_axis(p, best, -1)
    ids = best[..., : shape.k].astype(np.int16)
    all_tokens = np.ones(shape.tokens, dtype=bool)
    used = np.zeros((shape.layers, shape.experts), dtype=bool)
    record = TraceForward(
        *(number, 0, number, block * shape.tokens, block * shape.tokens),
        *(all_tokens, masked, ~all_tokens, ids, rank[..., :-1], rank[..., -1], used),
    )
    return replace(record, used=record.vanilla_mask)
