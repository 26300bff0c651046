"""Routings that are timed: set one by one, drawn as a skewed router would, or of real forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie import ops
from coterie.engine.watch import collect
from coterie.naming import CoterieError
from coterie.routing import Vanilla, parse_policy, route
from coterie.study.lab import Lab
from coterie.study.layers import Bench
from coterie.values import Policy, RouterSpec, Routing, Scores, membership

BLOCK = 32  # at which the paper counted unique experts
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


def controlled(
    router: RouterSpec, tokens: int, used: int, draw: torch.Generator, device: torch.device
) -> Routing:
    """Every token takes k of exactly ``used`` random experts, all of them equally often.

    Raises ValueError unless k <= used <= tokens * k.
    """
    if not router.k <= used <= min(tokens * router.k, router.experts):
        raise ValueError(f"{tokens} tokens of {router.k} experts cannot use {used} together")
    pool = torch.randperm(router.experts, generator=draw)[:used]
    ids = pool[torch.arange(tokens * router.k) % used].view(tokens, router.k).to(device)
    return Routing(
        ids=ids,
        weights=torch.full(ids.shape, 1 / router.k, device=device),
        used=membership(ids.flatten(), router.experts),
        own=ids,
    )


def skewed(router: RouterSpec, tokens: int, bend: float, draw: torch.Generator) -> Scores:
    """What a gate could think of one block: experts differ in how wanted they are, by ``bend``
    times as much as two tokens differ about one of them. [1, tokens, E]."""
    wanted = torch.randn(router.experts, generator=draw) * bend
    logits = wanted + torch.randn(1, tokens, router.experts, generator=draw)
    return Scores(logits=logits, router=router)


def bend_for(router: RouterSpec, unique: float, *, tokens: int = BLOCK, draws: int = 8) -> float:
    """The ``bend`` under which a block uses ``unique`` experts on average: bisection."""
    low, high = 0.0, 16.0
    for _ in range(20):
        middle = (low + high) / 2
        if mean_unique(router, tokens, middle, draws) > unique:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mean_unique(router: RouterSpec, tokens: int, bend: float, draws: int) -> float:
    """Unique experts of skewed blocks, always the same draws."""
    draw = torch.Generator().manual_seed(0)
    blocks = (route(skewed(router, tokens, bend, draw), Vanilla()) for _ in range(draws))
    return sum(float(routing.used.sum()) for routing in blocks) / draws


def routed(scores: Scores, policy: Policy, device: torch.device) -> Routing:
    """The routing of skewed scores, on the device where the experts are."""
    found = route(scores, policy)
    return Routing(*(part.to(device) for part in (found.ids, found.weights, found.used, found.own)))


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
