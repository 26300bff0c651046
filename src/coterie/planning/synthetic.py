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

from coterie.keys import Key, to_json
from coterie.naming import CoterieError
from coterie.planning.coding import Mask
from coterie.planning.trace import About, Forward, Trace

SPREAD, MIDDLE = 1.5, -2.0  # of the logits, before a sigmoid
TURNS = 16  # of a bisection
TRIED = (8, 6)  # layers and blocks that a calibration draws


@dataclass(frozen=True)
class Shape:
    """Sizes of what is drawn."""

    layers: int
    experts: int
    k: int
    tokens: int = 32
    steps: int = 8  # forwards of a block; each unmasks as many tokens
    expert_bytes: tuple[tuple[str, int], ...] = ()


MINI = Shape(
    layers=19,
    experts=256,
    k=8,
    expert_bytes=(("bf16", 6_291_456), ("int8", 3_244_032), ("int4", 1_769_472)),
)
"""LLaDA2.0-mini's; whole numbers of 8 and 4 bits with a bf16 scale for 64 and 32 of them."""


@dataclass(frozen=True)
class Look:
    """Three figures of a run under vanilla: experts that a forward uses in a layer, and the share
    of one forward's that the next uses too, in one block and from block to block."""

    unique: Annotated[float, Key("unique")]
    step_overlap: Annotated[float, Key("step_overlap")]
    block_overlap: Annotated[float, Key("block_overlap")]


@dataclass(frozen=True)
class Law:
    """Shares of variance, and the correlation of a token's own part from step to step."""

    always: Annotated[float, Key("always")]
    block: Annotated[float, Key("block")]
    steady: Annotated[float, Key("steady")]


def synthetic(shape: Shape, law: Law, *, blocks: int, seed: int = 0) -> Trace:
    """One long row of so many blocks."""
    rng = np.random.default_rng(seed)
    forwards = tuple(_forwards(shape, law, blocks, rng))
    about = About(
        model=f"drawn: {shape.layers} layers of {shape.experts} experts, {shape.k} a token",
        policy="vanilla",
        plan="",
        unmask="",
        layers=tuple(range(1, shape.layers + 1)),
        experts=shape.experts,
        k=shape.k,
        expert_bytes=dict(shape.expert_bytes),
        made={"seed": seed, "blocks": blocks, "steps": shape.steps, **to_json(law)},
    )
    return Trace(about, None, forwards)


def looked(trace: Trace) -> Look:
    """The three figures, of a trace of one row or more.

    Raises CoterieError where no block has two forwards, or no row two blocks.
    """
    own = [forward.own for forward in trace.forwards]
    decode = [place for place, one in enumerate(trace.forwards) if one.kind == "decode"]
    last: dict[int, int] = {}
    shares: dict[bool, list[float]] = {True: [], False: []}
    for place in decode:
        forward = trace.forwards[place]
        before = last.get(forward.row)
        if before is not None:
            same = trace.forwards[before].block == forward.block
            shares[same].append(
                float(((own[before] & own[place]).sum(-1) / own[before].sum(-1)).mean())
            )
        last[forward.row] = place
    if not shares[True] or not shares[False]:
        raise CoterieError("a trace needs blocks of several forwards and rows of several blocks")
    return Look(
        float(np.mean([own[place].sum(-1).mean() for place in decode])),
        float(np.mean(shares[True])),
        float(np.mean(shares[False])),
    )


def carried(look: Look, experts: int, unique: float, others: int) -> Look:
    """The look of a model with ``others`` experts of which a forward uses ``unique``: overlaps
    keep their place between what chance gives and all."""

    def over(share: float) -> float:
        chance = look.unique / experts
        return max(0.0, (share - chance) / (1 - chance))

    base = unique / others
    steps, blocks = (
        base + over(share) * (1 - base) for share in (look.step_overlap, look.block_overlap)
    )
    return Look(unique, steps, blocks)


def calibrated(shape: Shape, wanted: Look, *, seed: int = 1) -> Law:
    """The law under which drawn routing looks so, by bisection: each figure has its parameter."""
    few = replace(shape, layers=TRIED[0])

    def seen(law: Law) -> Look:
        return looked(synthetic(few, law, blocks=TRIED[1], seed=seed))

    law = Law(0.0, 0.5, 0.5)
    for _ in range(3):
        shared = _bisected(lambda x, law=law: -seen(_shared(law, x)).unique, -wanted.unique)
        law = _shared(law, shared)
        part = _bisected(
            lambda x, law=law: seen(_split(law, x)).block_overlap, wanted.block_overlap
        )
        law = _split(law, part)
        steady = _bisected(
            lambda x, law=law: seen(replace(law, steady=x)).step_overlap, wanted.step_overlap
        )
        law = replace(law, steady=steady)
    return law


def _shared(law: Law, share: float) -> Law:
    whole = max(law.always + law.block, 1e-9)
    return replace(law, always=share * law.always / whole, block=share * law.block / whole)


def _split(law: Law, part: float) -> Law:
    whole = law.always + law.block
    return replace(law, always=part * whole, block=(1 - part) * whole)


def _bisected(rising: Callable[[float], float], wanted: float) -> float:
    """x in [0, 1] where ``rising`` comes nearest to ``wanted``."""
    low, high = 0.0, 1.0
    for _ in range(TURNS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


def _forwards(shape: Shape, law: Law, blocks: int, rng: np.random.Generator) -> Iterator[Forward]:
    tokens, experts = shape.tokens, shape.experts
    own_share = max(0.0, 1 - law.always - law.block)
    always = rng.standard_normal((shape.layers, 1, experts)) * law.always**0.5
    number = 0
    for block in range(blocks):
        topic = always + rng.standard_normal((shape.layers, 1, experts)) * law.block**0.5
        single = rng.standard_normal((shape.layers, tokens, experts))
        order = rng.permutation(tokens)
        for step in range(shape.steps):
            masked = np.zeros(tokens, dtype=bool)
            masked[order[step * tokens // shape.steps :]] = True
            logits = SPREAD * (topic + single * own_share**0.5) + MIDDLE
            yield _forward(shape, logits, masked, number, block)
            fresh = rng.standard_normal(single.shape)
            single = law.steady * single + (1 - law.steady**2) ** 0.5 * fresh
            number += 1


def _forward(
    shape: Shape, logits: NDArray[np.float64], masked: Mask, number: int, block: int
) -> Forward:
    p = (1 / (1 + np.exp(-logits))).astype(np.float32)
    order = np.argpartition(-p, shape.k, axis=-1)[..., : shape.k + 1]
    best = np.take_along_axis(order, np.argsort(-np.take_along_axis(p, order, -1), -1), -1)
    rank = np.take_along_axis(p, best, -1)
    ids = best[..., : shape.k].astype(np.int16)
    everybody = np.ones(shape.tokens, dtype=bool)
    used = np.zeros((shape.layers, shape.experts), dtype=bool)
    made = Forward(
        *(number, 0, number, block * shape.tokens, block * shape.tokens),
        *(everybody, masked, ~everybody, ids, rank[..., :-1], rank[..., -1], used),
    )
    return replace(made, used=made.own)
