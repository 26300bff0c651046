"""Routings to time: balanced, or drawn from a skewed router."""

from __future__ import annotations

import torch

from coterie.routing import Vanilla, route
from coterie.values import Policy, RouterSpec, Routing, Scores, expert_mask

BLOCK_LENGTH = 32  # the paper's block length for counts of unique experts


def balanced_routing(
    router: RouterSpec,
    tokens: int,
    unique_experts: int,
    generator: torch.Generator,
    device: torch.device,
) -> Routing:
    """Every token uses k of ``unique_experts`` random experts, all of them equally often.

    Raises ValueError unless k <= unique_experts <= tokens * k.
    """
    if not router.k <= unique_experts <= min(tokens * router.k, router.experts):
        raise ValueError(
            f"{tokens} tokens of {router.k} experts cannot use {unique_experts} together"
        )
    pool = torch.randperm(router.experts, generator=generator)[:unique_experts]
    ids = pool[torch.arange(tokens * router.k) % unique_experts].view(tokens, router.k).to(device)
    return Routing(
        topk_ids=ids,
        topk_weights=torch.full(ids.shape, 1 / router.k, device=device),
        used=expert_mask(ids.flatten(), router.experts),
        vanilla_ids=ids,
    )


def skewed_scores(
    router: RouterSpec, tokens: int, skew: float, generator: torch.Generator
) -> Scores:
    """Random router logits of one block, [1, tokens, E].

    Each logit is the expert's popularity plus noise per token. ``skew`` is the standard deviation
    of the popularity; that of the noise is 1.
    """
    popularity = torch.randn(router.experts, generator=generator) * skew
    logits = popularity + torch.randn(1, tokens, router.experts, generator=generator)
    return Scores(logits=logits, router=router)


def find_skew(
    router: RouterSpec, unique_experts: float, *, tokens: int = BLOCK_LENGTH, samples: int = 8
) -> float:
    """The skew with which a block uses ``unique_experts`` on average, by bisection."""
    low, high = 0.0, 16.0
    for _ in range(20):
        middle = (low + high) / 2
        if mean_unique_experts(router, tokens, middle, samples) > unique_experts:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mean_unique_experts(router: RouterSpec, tokens: int, skew: float, samples: int) -> float:
    """Mean unique experts of skewed blocks, with fixed random numbers."""
    generator = torch.Generator().manual_seed(0)
    blocks = (
        route(skewed_scores(router, tokens, skew, generator), Vanilla()) for _ in range(samples)
    )
    return sum(float(routing.used.sum()) for routing in blocks) / samples


def route_on_device(scores: Scores, policy: Policy, device: torch.device) -> Routing:
    """Routes on the CPU and copies the routing to ``device``."""
    routing = route(scores, policy)
    ids, weights, used, vanilla_ids = (
        part.to(device)
        for part in (routing.topk_ids, routing.topk_weights, routing.used, routing.vanilla_ids)
    )
    return Routing(ids, weights, used, vanilla_ids)
