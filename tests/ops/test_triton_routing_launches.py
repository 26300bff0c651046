"""Routing by kernels for a GPU: two launches, and every variant of them compiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_compilation import compiled
from torch.utils._python_dispatch import TorchDispatchMode
from triton_routing_cases import VOTE_NAMES

from coterie.values import CoresetRule, RouterSpec, Scores

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")


class Queued(TorchDispatchMode):
    """Every operation of torch that would queue work or wait for it; views and memory do not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ("empty", "empty_like", "new_empty", "view", "detach"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "rule",
    [
        None,
        CoresetRule(count=5),
        CoresetRule("full", mass=0.7, protect=1, resident_bonus=1.0),
        CoresetRule(union=2),
    ],
)
def test_routing_is_two_launches_and_one_for_admission(
    rule: CoresetRule | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels that do nothing: only operations of torch itself are recorded."""
    from coterie.ops.triton import routing

    monkeypatch.undo()  # poisoning memory is an operation too
    launches: list[object] = []
    monkeypatch.setattr(routing, "launch", lambda kernel, *rest, **sizes: launches.append(kernel))
    scores = Scores(
        torch.zeros(1, 6, 16),
        RouterSpec(16, 3, "sigmoid", True),
        bias=torch.zeros(16),
        resident=torch.zeros(16, dtype=torch.bool),
    )
    vote_weight = torch.ones(1, 6)
    admitting = replace(scores, router=replace(scores.router, capacity=5))
    for each, count in ((scores, 2), (admitting, 3)):
        launches.clear()
        with Queued() as queued:
            routing.route(each, rule, vote_weight)
        assert len(launches) == count
        assert queued.seen == []


LAUNCHES = """
import torch
from coterie.ops.triton import route
from coterie.values import CoresetRule, RouterSpec, Scores

mini = RouterSpec(256, 8, "sigmoid", True, 2.5, 8, 4, False, 1e-20)
moe = RouterSpec(64, 8, "softmax", False)
blocks = RouterSpec(256, 8, "sigmoid", True, 2.5, epsilon=1e-20, capacity=48)

def go(router, tokens, rule):
    experts = torch.zeros(router.experts)
    scores = Scores(
        torch.zeros(1, tokens, router.experts),
        router,
        experts,
        resident=experts > 0,
        starts=torch.zeros(1, dtype=torch.int64),
    )
    assert route(scores, rule, torch.ones(1, tokens)) is not None
"""


@pytest.mark.slow
def test_every_rule_compiles_for_a_gpu() -> None:
    rules = [CoresetRule(union=3), CoresetRule(union=8), CoresetRule(count=9)]
    for vote in VOTE_NAMES:
        rules += [
            CoresetRule(vote, count=9, protect=1, resident_bonus=1.0),
            CoresetRule(vote, count=9),
        ]
        rules += (
            [] if vote == "max" else [CoresetRule(vote, mass=0.8, protect=1, resident_bonus=1.0)]
        )
    calls = [f"go({router}, 32, {rule})" for rule in rules for router in ("mini", "moe")]
    calls += [f"go({router}, 512, CoresetRule(count=9))" for router in ("mini", "moe")]
    kernels = compiled("\n".join([LAUNCHES, *calls]))
    assert {kernel.name for kernel in kernels} == {"vote_kernel", "choose_kernel"}
    assert all(kernel.stack <= 16 for kernel in kernels), kernels
