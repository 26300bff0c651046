"""Blocks whose layers are timed: drawn as a skewed router would route them, or of real forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.observation import collect_observations
from coterie.errors import CoterieError
from coterie.lab.bench.routings import find_skew, route_on_device, skewed_scores
from coterie.lab.study.context import StudyContext
from coterie.lab.study.layers import BenchLayer
from coterie.routing import parse_policy
from coterie.values import Routing, Scores

INPUTS_PER_WIDTH = 4  # blocks of one width that take turns
NUM_PROMPTS = 4
FORWARDS_PER_PROMPT = 2  # of each prompt


@dataclass(frozen=True)
class ScoredBlock:
    """One block's way through a layer, to be routed under any policy."""

    x: Tensor  # [N, H]
    scores: Scores


def make_blocks(context: StudyContext, bench: BenchLayer, tokens: int) -> list[ScoredBlock]:
    """Real decoding forwards of the model's own layers, layer after layer, one row at a time; for
    a random layer, blocks of a router as skewed as the paper saw. None where ``tokens`` is no
    block size for this plan or model."""
    if bench.typical_unique is None:
        try:
            prompts = context.questions()[:NUM_PROMPTS]
            observations = collect_observations(
                context.engine,
                prompts,
                batch_size=1,
                max_forwards=FORWARDS_PER_PROMPT,
                block=tokens,
            )
        except CoterieError:
            return []
        return [
            ScoredBlock(observation.x.flatten(0, 1), observation.scores)
            for observation in observations
        ]
    skew = find_skew(bench.router, bench.typical_unique)
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (bench.inputs(tokens, generator), skewed_scores(bench.router, tokens, skew, generator))
        for _ in range(INPUTS_PER_WIDTH)
    ]
    return [ScoredBlock(x, scores) for x, scores in pairs]


@dataclass(frozen=True)
class RoutedBlocks:
    """Blocks routed under one policy, ready to run; means over them."""

    run: Callable[[], Tensor]
    used: float  # unique experts
    pairs: float  # of a token and an expert


def route_blocks(
    bench: BenchLayer, scored_blocks: Sequence[ScoredBlock], policy: str
) -> RoutedBlocks:
    """The experts' work on these blocks under a policy; the routing itself is done before."""
    parsed = parse_policy(policy)
    routings = [
        route_on_device(replace(block.scores), parsed, bench.device) for block in scored_blocks
    ]
    return RoutedBlocks(
        run=rotate_inputs(bench, [block.x for block in scored_blocks], routings),
        used=sum(int(routing.used.sum()) for routing in routings) / len(routings),
        pairs=sum(int((routing.topk_ids >= 0).sum()) for routing in routings) / len(routings),
    )


def rotate_inputs(
    bench: BenchLayer, xs: Sequence[Tensor], routings: Sequence[Routing]
) -> Callable[[], Tensor]:
    """Runs the experts; every call takes the next input and routing, and the next slab."""
    calls = iter(range(1 << 62))

    def run() -> Tensor:
        call = next(calls)
        index, slab = call % len(routings), bench.slabs[call % len(bench.slabs)]
        return ops.run_experts(xs[index], routings[index], slab)

    return run
