"""Routing on a GPU: the kernels against the same policy in plain torch, checked and timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from coterie.lab.records import Measurement
from coterie.ops import reference, triton
from coterie.routing import parse_policy
from coterie.routing.router import KernelPolicy, route_by_mask
from coterie.values import Policy, RouterSpec, Routing, Scores
from experiments.gpu.report import PartReport
from experiments.gpu.timing import Work, kernel_names, time_launches, time_replays

POLICIES = (
    *("vanilla", "des-seq:k=3", "des-vote:beta=0.15", "xshare:beta=0.15", "mass-vote:tau=0.8"),
    "des-vote:beta=0.15,vote=weight,protect=top1",
)
ROUTERS = {
    "M=256": RouterSpec(256, 8, "sigmoid", True, 2.5, 8, 4, epsilon=1e-20),
    "M=64": RouterSpec(64, 8, "softmax", False),
}
TINY_ROUTERS = {"M=16": RouterSpec(16, 3, "sigmoid", True, 2.5, 4, 2)}
JUDGED = "des-vote:beta=0.15"
TARGETS = {"torch / ours, device": 8.0, "torch / ours, launched": 6.0}
MAX_LAUNCHES = 2


def measure(device: torch.device, report: PartReport, *, dry: bool = False) -> None:
    """Each policy and the dispatch of tokens, for one block; ``dry``: tiny sizes."""
    with torch.inference_mode():
        for size, router in (TINY_ROUTERS if dry else ROUTERS).items():
            scores = random_scores(router, 3 if dry else 32, device)
            for text in sorted(POLICIES, key=lambda text: text != JUDGED):
                with report.attempt(f"routing {size}, {text}"):
                    _compare_policy(f"{size}, {text}", scores, parse_policy(text), report)
                    if text == JUDGED:
                        _add_targets(f"{size}, {text}", report)
            with report.attempt(f"routing {size}, lists of tokens"):
                _compare_dispatch(f"{size}, lists of tokens", scores, report)


def random_scores(router: RouterSpec, tokens: int, device: torch.device) -> Scores:
    """Scores without near-ties, so that two implementations of exp choose alike."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(1, tokens, router.experts, generator=generator).argsort(-1)
    width = 4 + 4 * torch.rand(1, tokens, 1, generator=generator)
    return Scores(((order / router.experts - 0.5) * width).to(device), router)


def route_by_kernel(scores: Scores, policy: Policy) -> Routing:
    assert isinstance(policy, KernelPolicy)
    kernel = policy.kernel_rule(scores, scores.router.k)
    assert kernel is not None
    routing = triton.route(kernel.scores, kernel.rule, kernel.vote_weight)
    assert routing is not None
    return routing


def _compare_policy(name: str, scores: Scores, policy: Policy, report: PartReport) -> None:
    def ours() -> Routing:  # new Scores each time, as in every layer: they cache derived tensors
        return route_by_kernel(replace(scores), policy)

    def torchs() -> Routing:
        return route_by_mask(replace(scores), policy)

    routing, expected = vars(ours()), vars(torchs())
    weights = (routing.pop("topk_weights"), expected["topk_weights"])
    close = torch.allclose(*weights, rtol=1e-4, atol=1e-7)
    _add_agreement(name, close and _equal(routing, expected), report)
    _compare(name, {"torch": torchs, "ours": ours}, scores, report)


def _compare_dispatch(name: str, scores: Scores, report: PartReport) -> None:
    from coterie.ops.triton import dispatch

    routing = route_by_mask(scores, parse_policy("vanilla"))
    experts = scores.router.experts
    slot_of = torch.arange(experts, device=scores.logits.device)

    def ours() -> object:
        return dispatch(routing, slot_of, experts)

    def torchs() -> object:
        return reference.dispatch(routing, slot_of, experts)

    _add_agreement(name, _equal(vars(ours()), vars(torchs())), report)
    _compare(name, {"torch": torchs, "ours": ours}, scores, report)


def _compare(name: str, works: dict[str, Work], scores: Scores, report: PartReport) -> None:
    """Add the kernels that torch and ours run, and their times."""
    device, facts = scores.logits.device, report.facts[name]
    assert isinstance(facts, dict)
    for side, work in works.items():
        facts[f"kernels run by {side}"] = len(kernel_names(work, device))
    for how, clock in (("device", time_replays), ("launched", time_launches)):
        medians = []
        for side, work in works.items():
            try:
                times = Measurement(f"{name}: {side}, {how}", "us", tuple(clock(work, device)))
            except RuntimeError as error:  # some work cannot be captured in a graph
                facts[f"{side}, {how}: not measured"] = str(error)[:300]
                continue
            report.measures.append(times)
            medians.append(times.median)
        if len(medians) == 2:
            facts[f"torch / ours, {how}"] = round(medians[0] / medians[1], 2)


def _add_agreement(name: str, agrees: bool, report: PartReport) -> None:
    report.facts[name] = {"agrees": agrees}
    report.add_figure(f"routing {name}: as plain torch", float(agrees), 1.0, required=True)


def _add_targets(name: str, report: PartReport) -> None:
    facts: Any = report.facts[name]
    for ratio, target in TARGETS.items():
        if ratio in facts:
            report.add_figure(f"routing {name}: {ratio}", facts[ratio], target)
    launches, limits = facts["kernels run by ours"], {"at_most": True, "required": True}
    report.add_figure(f"routing {name}: launches", launches, MAX_LAUNCHES, **limits)
    # A profiler that sees nothing counts none.
    report.add_figure(
        f"routing {name}: launches seen", launches, 1.0, required=torch.cuda.is_available()
    )


def _equal(values: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether the same tensors are set, with the same values."""
    pairs = [(value, expected[name]) for name, value in values.items()]
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
