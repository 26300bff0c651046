"""Blocks whose layers are timed: drawn as a skewed router would route them, or of real forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie import ops
from coterie.bench.routings import bend_for, routed, skewed
from coterie.engine.watch import collect
from coterie.naming import CoterieError
from coterie.routing import parse_policy
from coterie.study.lab import Lab
from coterie.study.layers import Bench
from coterie.values import Routing, Scores

TURNS = 4  # blocks of one width that take turns
PROMPTS = 4
FORWARDS = 2  # of each prompt


@dataclass(frozen=True)
class Block:
    """One block's way through a layer, to be routed under any policy."""

    x: Tensor  # [N, H]
    scores: Scores


def blocks(lab: Lab, bench: Bench, tokens: int) -> list[Block]:
    """Real decoding forwards of the model's own layers, layer after layer, one row at a time; for
    a random layer, blocks of a router as skewed as the paper saw. None where ``tokens`` is no
    block size for this plan or model."""
    if bench.unique is None:
        try:
            asked = lab.questions()[:PROMPTS]
            seen = collect(lab.engine, asked, rows=1, forwards=FORWARDS, block=tokens)
        except CoterieError:
            return []
        return [Block(each.x.flatten(0, 1), each.scores) for each in seen]
    bend = bend_for(bench.router, bench.unique)
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (bench.inputs(tokens, draw), skewed(bench.router, tokens, bend, draw)) for _ in range(TURNS)
    ]
    return [Block(x, scores) for x, scores in pairs]


@dataclass(frozen=True)
class Routed:
    """Blocks routed under one policy, ready to run; means over them."""

    work: Callable[[], Tensor]
    used: float  # unique experts
    pairs: float  # of a token and an expert


def under(bench: Bench, here: Sequence[Block], policy: str) -> Routed:
    """The experts' work on these blocks under a policy; the routing itself is done before."""
    chosen = parse_policy(policy)
    routings = [routed(replace(block.scores), chosen, bench.device) for block in here]
    return Routed(
        work=turning(bench, [block.x for block in here], routings),
        used=sum(int(routing.used.sum()) for routing in routings) / len(routings),
        pairs=sum(int((routing.ids >= 0).sum()) for routing in routings) / len(routings),
    )


def turning(
    bench: Bench, xs: Sequence[Tensor], routings: Sequence[Routing]
) -> Callable[[], Tensor]:
    """Runs the experts; every call takes the next input and routing, and the next slab."""
    calls = iter(range(1 << 62))

    def work() -> Tensor:
        call = next(calls)
        at, slab = call % len(routings), bench.slabs[call % len(bench.slabs)]
        return ops.run_experts(xs[at], routings[at], slab)

    return work
