"""Routings that are timed: set one by one, or drawn as a skewed router would."""

from __future__ import annotations

import torch

from coterie.routing import Vanilla, route
from coterie.values import Policy, RouterSpec, Routing, Scores, membership

BLOCK = 32  # at which the paper counted unique experts


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
    ids, weights, used, own = (
        part.to(device) for part in (found.ids, found.weights, found.used, found.own)
    )
    return Routing(ids, weights, used, own)
