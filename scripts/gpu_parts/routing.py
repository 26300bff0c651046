"""Routing on a GPU: the kernels against the same rule in plain torch, checked and then timed."""

from __future__ import annotations

from dataclasses import replace

import torch
from gpu_parts.clock import Work, kernels, launched, replayed
from gpu_parts.found import Figure, Found

from coterie.lab.records import Measurement
from coterie.ops import reference, triton
from coterie.routing import parse_policy
from coterie.routing.router import KernelPolicy, route_by_mask
from coterie.values import Policy, RouterSpec, Routing, Scores

POLICIES = (
    "vanilla",
    "des-seq:k=3",
    "des-vote:beta=0.15",
    "des-vote:beta=0.15,vote=weight,protect=top1",
    "xshare:beta=0.15",
    "mass-vote:tau=0.8",
)
ROUTERS = {
    "M=256": RouterSpec(256, 8, "sigmoid", True, 2.5, 8, 4, epsilon=1e-20),
    "M=64": RouterSpec(64, 8, "softmax", False),
}
TINY = {"M=16": RouterSpec(16, 3, "sigmoid", True, 2.5, 4, 2)}


ELECTED = "des-vote:beta=0.15"  # what is judged
TARGETS = {"torch / ours, device": 8.0, "torch / ours, launched": 6.0}


def measure(
    device: torch.device, *, tokens: int = 32, dry: bool = False, found: Found | None = None
) -> Found:
    """Some policies and the lists of tokens, for one block. ``dry``: everything, tiny sizes."""
    routers = TINY if dry else ROUTERS
    found = found or Found()
    with torch.inference_mode():
        for size, router in routers.items():
            scores = block(router, 3 if dry else tokens, device)
            for text in sorted(POLICIES, key=lambda text: text != ELECTED):
                with found.trying(f"routing {size}, {text}"):
                    _compare(f"{size}, {text}", scores, parse_policy(text), found)
                    if text == ELECTED:
                        _judge(f"{size}, {text}", found)
            with found.trying(f"routing {size}, lists of tokens"):
                _compare_dispatch(f"{size}, lists of tokens", scores, found)
    return found


def _judge(name: str, found: Found) -> None:
    facts = found.facts[name]
    for what, target in TARGETS.items():
        if what in facts:
            found.judge(Figure(f"routing {name}: {what}", facts[what], target))
    launches = facts["kernels run by ours"]
    found.judge(Figure(f"routing {name}: launches", launches, 2, most=True, must=True))


def block(router: RouterSpec, tokens: int, device: torch.device) -> Scores:
    """Scores no two of which are close, so that two exponentials do not choose differently."""
    draw = torch.Generator().manual_seed(0)
    order = torch.rand(1, tokens, router.experts, generator=draw).argsort(-1)
    width = 4 + 4 * torch.rand(1, tokens, 1, generator=draw)
    logits = (order / router.experts - 0.5) * width
    return Scores(logits.to(device), router)


def _compare(name: str, scores: Scores, policy: Policy, found: Found) -> None:
    # New values every time, as in every layer: what is worked out once stays with the old ones.
    ours, torchs = (
        (lambda: _by_kernel(replace(scores), policy)),
        (lambda: route_by_mask(replace(scores), policy)),
    )
    routing, expected = vars(ours()), vars(torchs())
    close = torch.allclose(routing.pop("weights"), expected["weights"], rtol=1e-4, atol=1e-7)
    _agree(name, close and _same(routing, expected), found)
    _race(name, ours, torchs, scores.logits.device, found)


def _compare_dispatch(name: str, scores: Scores, found: Found) -> None:
    routing = route_by_mask(scores, parse_policy("vanilla"))
    experts = scores.router.experts
    slot_of = torch.arange(experts, device=scores.logits.device)
    ours, torchs = (
        (lambda: triton.dispatch(routing, slot_of, experts)),
        (lambda: reference.dispatch(routing, slot_of, experts)),
    )
    _agree(name, _same(vars(ours()), vars(torchs())), found)
    _race(name, ours, torchs, scores.logits.device, found)


def _agree(name: str, agrees: bool, found: Found) -> None:
    found.facts[name] = {"agrees": agrees}
    found.judge(Figure(f"routing {name}: as plain torch", float(agrees), 1.0, must=True))


def _race(name: str, ours: Work, torchs: Work, device: torch.device, found: Found) -> None:
    facts = found.facts[name]
    facts["kernels run by torch"] = len(kernels(torchs, device))
    facts["kernels run by ours"] = len(kernels(ours, device))
    for how, clock in (("device", replayed), ("launched", launched)):
        medians = []
        for who, work in (("torch", torchs), ("ours", ours)):
            try:
                taken = Measurement(f"{name}: {who}, {how}", "us", tuple(clock(work, device)))
            except RuntimeError as error:  # what a graph cannot hold; the rest is worth having
                facts[f"{who}, {how}: not measured"] = str(error)[:300]
                continue
            found.measures.append(taken)
            found.keep(found)
            medians.append(taken.median)
        if len(medians) == 2:
            facts[f"torch / ours, {how}"] = round(medians[0] / medians[1], 2)


def _by_kernel(scores: Scores, policy: Policy) -> Routing:
    assert isinstance(policy, KernelPolicy)
    told = policy.kernel_rule(scores, scores.router.k)
    assert told is not None
    found = triton.route(told.scores, told.rule, told.vote_weight)
    assert found is not None
    return found


def _same(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> bool:
    """Whether the same is said, and the same is left unsaid."""
    pairs = [(value, expected[name]) for name, value in found.items()]
    return all(
        one is other if one is None or other is None else torch.equal(one, other)
        for one, other in pairs
    )
