"""Synthetic traces: random routing with a model's sizes and its overlap from step to step.

A router logit is the sum of three normal parts: the expert's, the expert's in a block, and the
token's own. The token's part keeps a correlation from step to step. Shared parts make tokens agree,
so that fewer experts are used. The variances come from a record (``records.read_law``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from coterie.keys import Key, to_json
from coterie.lab.replay.trace import Mask, Trace, TraceForward, TraceHeader

LOGIT_STD, LOGIT_MEAN = 1.5, -2.0  # before the sigmoid


@dataclass(frozen=True)
class SyntheticShape:
    """The sizes of a synthetic trace."""

    layers: int
    experts: int
    k: int
    tokens: int = 32
    steps: int = 8  # forwards of a block; each unmasks as many tokens
    commits: bool = False  # a last forward of each block, without masks, commits it
    expert_bytes: tuple[tuple[str, int], ...] = ()


LLADA2_MINI = SyntheticShape(layers=19, experts=256, k=8)


@dataclass(frozen=True)
class RoutingLaw:
    """Shares of the variance, and the correlation of a token's part from step to step."""

    expert_variance: Annotated[float, Key("always")]
    block_variance: Annotated[float, Key("block")]
    step_correlation: Annotated[float, Key("steady")]


def synthetic_trace(shape: SyntheticShape, law: RoutingLaw, *, blocks: int, seed: int = 0) -> Trace:
    """A trace of one row of so many blocks."""
    forwards = tuple(_draw_forwards(shape, law, blocks, np.random.default_rng(seed)))
    provenance = {"seed": seed, "blocks": blocks, "steps": shape.steps, **to_json(law)}
    header = TraceHeader(
        f"synthetic: {shape.layers} layers of {shape.experts} experts, top {shape.k}",
        *("vanilla", "", "", tuple(range(1, shape.layers + 1)), shape.experts, shape.k),
        expert_bytes=dict(shape.expert_bytes),
        provenance=provenance,
    )
    return Trace(header, None, forwards)


def _draw_forwards(
    shape: SyntheticShape, law: RoutingLaw, blocks: int, rng: np.random.Generator
) -> Iterator[TraceForward]:
    tokens, correlation = shape.tokens, law.step_correlation
    shared = (shape.layers, 1, shape.experts)
    token_std = max(0.0, 1 - law.expert_variance - law.block_variance) ** 0.5
    expert_part = rng.standard_normal(shared) * law.expert_variance**0.5
    for block in range(blocks):
        block_part = expert_part + rng.standard_normal(shared) * law.block_variance**0.5
        token_part = rng.standard_normal((shape.layers, tokens, shape.experts))
        order, forwards = rng.permutation(tokens), shape.steps + shape.commits
        for step in range(forwards):
            masked = np.zeros(tokens, dtype=bool)
            masked[order[step * tokens // shape.steps :]] = True
            logits = LOGIT_STD * (block_part + token_part * token_std) + LOGIT_MEAN
            drawn = _draw_forward(shape, logits, masked, block * forwards + step, block)
            yield drawn if step < shape.steps else replace(drawn, kind="commit")
            noise = rng.standard_normal(token_part.shape)
            token_part = correlation * token_part + (1 - correlation**2) ** 0.5 * noise


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
    forward = TraceForward(
        *(number, 0, number, block * shape.tokens, block * shape.tokens),
        *(all_tokens, masked, ~all_tokens, ids, rank[..., :-1], rank[..., -1], used),
    )
    return replace(forward, used=forward.vanilla_mask)
