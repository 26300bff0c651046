"""What kernels are told of a policy, and that what they route equals plain torch by value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

from coterie import ops
from coterie.errors import CoterieError
from coterie.ops import cpu
from coterie.routing import Vanilla, parse_policy, route, router
from coterie.routing.router import KernelPolicy, KernelRouting, route_by_mask
from coterie.values import (
    CoresetRule,
    DecodeProgress,
    Policy,
    PreviousCoresets,
    RouterSpec,
    Routing,
    Scores,
)

ROUTER = RouterSpec(experts=32, k=4, activation="sigmoid", renormalise=True)
SCORES = Scores(
    torch.linspace(-2, 2, 2 * 6 * 32).sin().view(2, 6, 32),
    ROUTER,
    progress=DecodeProgress(after_eos=torch.zeros(2, 6, dtype=torch.bool)),
)
VANILLA = Vanilla()
ISAS = cpu.available_isas() if cpu.is_available() else ("none",)
needs_kernels = pytest.mark.skipif(
    not cpu.is_available(), reason="NOT TESTED: the kernels for CPUs are not built"
)


def ruling(text: str, scores: Scores = SCORES) -> KernelRouting | None:
    policy = parse_policy(text)
    return policy.kernel_rule(scores, scores.router.k) if isinstance(policy, KernelPolicy) else None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("vanilla", None),
        ("des-seq:k=4", None),
        ("des-seq:k=3", CoresetRule(union=3)),
        ("des-seq:k=4,voters=before-eos", CoresetRule(union=4)),
        ("des-vote:beta=0.15", CoresetRule(count=4, eps=0.02)),
        (
            "des-vote:beta=0.5,vote=weight,protect=top1",
            CoresetRule("weight", 0, 16, protect=1, eps=0.02),
        ),
        ("uniform-vote:beta=0.01", CoresetRule("count", count=1, eps=0.02)),
        ("xshare:beta=1", CoresetRule("full", count=32, protect=1, eps=0.02)),
        ("racing:m=48", CoresetRule("max", count=32, eps=0.02)),
        ("mass-vote:tau=0.8", CoresetRule(mass=0.8, least=4, eps=0.02)),
        ("mass-vote:tau=0.8,least=40", CoresetRule(mass=0.8, least=32, eps=0.02)),
        ("resident-vote:beta=0.5,lam=2,eps=0.1", CoresetRule(count=16, lam=2.0, eps=0.1)),
        ("coreset:m=3,vote=margin", CoresetRule("margin", count=3, eps=0.02)),
        ("des-vote:beta=0.5,most=7", CoresetRule(count=7, eps=0.02)),
        ("xshare:beta=0.5,most=7", CoresetRule("full", count=7, protect=1, eps=0.02, most=7)),
        ("des-seq:k=4,most=7", CoresetRule(union=4, eps=0.02, most=7)),
        ("des-vote:beta=0.5,max=slots", CoresetRule(count=16, eps=0.02)),
    ],
)
def test_a_policy_tells_its_rule_in_plain_numbers(text: str, rule: CoresetRule | None):
    told = ruling(text)
    assert told is not None
    assert told.rule == rule


@pytest.mark.parametrize(
    "text",
    ["naee:beta=0.6", "mc-moe:beta=0.6", "random:beta=0.5", "coreset:m=3,vote=random"],
)
def test_what_plain_numbers_cannot_say_has_no_rule(text: str):
    assert ruling(text) is None


def test_a_list_of_budgets_is_the_layers_own_rule():
    told = ruling("des-vote:beta=0.25/0.5", replace(SCORES, moe_index=1))
    assert told is not None
    assert told.rule == CoresetRule(count=16, eps=0.02)


def test_everybody_has_one_vote_unless_somebody_says_otherwise():
    voters = torch.tensor([[1.0] * 3 + [0.0] * 3] * 2)
    filled = torch.tensor([[False] * 2 + [True] * 4] * 2)
    scores = replace(SCORES, voters=voters, progress=DecodeProgress(after_eos=filled))
    everybody, engine = ruling("des-vote:beta=0.5"), ruling("des-vote:beta=0.5", scores)
    unfilled = ruling("des-vote:beta=0.5,voters=before-eos", scores)
    assert everybody is not None
    assert engine is not None
    assert unfilled is not None
    assert everybody.vote_weight is None
    assert engine.vote_weight is not None
    assert unfilled.vote_weight is not None
    assert torch.equal(engine.vote_weight, voters)
    assert torch.equal(unfilled.vote_weight, torch.tensor([[1.0] * 2 + [0.0] * 4] * 2))


def test_rows_that_share_a_coreset_are_ruled_as_one():
    told = ruling("des-vote:beta=0.5,scope=batch")
    assert told is not None
    assert torch.equal(told.scores.logits, SCORES.logits.view(1, 12, 32))


def test_routing_asks_the_kernel_first_and_torch_where_there_is_none(monkeypatch):
    asked: list[CoresetRule | None] = []
    made = route_by_mask(SCORES, parse_policy("vanilla"))

    def kernel(scores: Scores, rule: CoresetRule | None, voice: Tensor | None) -> Routing | None:
        asked.append(rule)
        return made if rule is None else None

    monkeypatch.setattr(ops, "route", kernel)
    assert route(SCORES, parse_policy("vanilla")) is made
    plain = route(SCORES, parse_policy("des-seq:k=1"))
    assert torch.equal(plain.topk_ids, route_by_mask(SCORES, parse_policy("des-seq:k=1")).topk_ids)
    assert asked == [None, CoresetRule(union=1)]


def test_a_policy_of_a_callers_own_needs_no_ruling():
    @dataclass(frozen=True)
    class Evens:
        def eligible(self, scores: Scores, k: int) -> Tensor:
            return (torch.arange(scores.router.experts) % 2 == 0).view(1, 1, -1)

    policy: Policy = Evens()
    ids = route(SCORES, policy).topk_ids
    assert bool((ids % 2 == 0).all())


@st.composite
def odd_blocks(draw: st.DrawFn) -> Scores:
    """Scores of every shape: 1 - 300 experts, 1 - 64 tokens of 1 - 4 rows, mostly ties."""
    groups = draw(st.sampled_from((1, 1, 2, 4, 8)))
    size = draw(st.integers(1, 300 // groups))
    experts, renormalise = groups * size, draw(st.booleans())
    router = RouterSpec(
        experts=experts,
        k=draw(st.integers(1, min(20, experts))),
        activation=draw(st.sampled_from(("softmax", "sigmoid"))),
        renormalise=renormalise,
        scale=draw(st.sampled_from((1.0, 2.5))),
        groups=groups,
        topk_groups=draw(st.integers(1, groups)),
        biased_weight=draw(st.booleans()) and not renormalise,
        epsilon=draw(st.sampled_from((0.0, 1e-20))),
    )
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 64)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    coarse = draw(st.sampled_from((0.0, 1.0, 4.0)))
    logits = 2 * torch.randn(*shape, experts, generator=generator)
    bias = torch.randn(experts, generator=generator) / 4
    if coarse:
        logits, bias = (logits * coarse).round() / coarse, (bias * 4).round() / 4
    voters = torch.rand(shape, generator=generator) * 2 - 1
    return Scores(
        logits=logits,
        router=router,
        bias=draw(st.sampled_from((None, bias))),
        voters=draw(st.sampled_from((None, voters > 0, voters.clamp(min=0)))),
        progress=DecodeProgress(
            masked=torch.rand(shape, generator=generator) < 0.7,
            after_eos=torch.rand(shape, generator=generator) < 0.3,
            uncertainty=torch.rand(shape, generator=generator),
        ),
        resident=draw(st.sampled_from((None, torch.rand(experts, generator=generator) < 0.4))),
        slots=draw(st.sampled_from((None, 1 + experts // 3, experts))),
        previous_coresets=draw(st.sampled_from((None, incumbents(shape[0], experts, generator)))),
        forward_indices=(1,) * shape[0],
    )


def incumbents(rows: int, experts: int, generator: torch.Generator) -> PreviousCoresets:
    """Coresets of any size; of some rows none."""
    there = torch.rand(rows, experts, generator=generator) < torch.rand(
        rows, 1, generator=generator
    )
    drift = float(torch.rand((), generator=generator))
    return PreviousCoresets(drift, there & (torch.rand(rows, 1, generator=generator) < 0.8))


@st.composite
def ruled(draw: st.DrawFn) -> str:
    """A policy that has a rule: every vote, size, protection, residency, voters and scope."""
    size = draw(st.sampled_from(("beta=0.15", "beta=0.6", "m=5", "tau=0.8", "tau=0.5,least=9")))
    said = {
        "vote": draw(st.sampled_from(("masked", "weight", "count", "full", "margin", "max"))),
        "protect": draw(st.sampled_from(("none", "top1"))),
        "voters": draw(st.sampled_from(("all", "unfilled", "masked", "uncertain"))),
        "scope": draw(st.sampled_from(("block", "batch"))),
        "lam": draw(st.sampled_from((0, 0.5, 2))),
        "eps": draw(st.sampled_from((0, 0.02, 0.3))),
    }
    if draw(st.booleans()):
        said["most"] = draw(st.sampled_from((1, 7, "slots")))
    point = f"coreset:{size},{','.join(f'{name}={value}' for name, value in said.items())}"
    union = ("voters", "scope", "most")
    kept = ",".join(f"{name}={said[name]}" for name in union if name in said)
    first = f"des-seq:k={draw(st.integers(1, 9))},{kept}"
    return draw(st.sampled_from((point, point, first, "vanilla")))


def with_isa(isa: str, told: KernelRouting) -> Routing | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_ISA", isa)
        return ops.route(told.scores, told.rule, told.vote_weight)


@needs_kernels
@given(odd_blocks(), ruled(), st.sampled_from(ISAS))
@law(150)
def test_one_call_routes_as_plain_torch_does(scores: Scores, text: str, isa: str):
    if text == "vanilla" or "scope=batch" in text:  # these keep no coresets
        scores = replace(scores, previous_coresets=None)
    told, expected = ruling(text, scores), route_by_mask(scores, parse_policy(text))
    assert told is not None
    found = with_isa(isa, told)
    assert found is not None
    for one, other in (
        (found.topk_ids, expected.topk_ids),
        (found.vanilla_ids, expected.vanilla_ids),
    ):
        assert torch.equal(one, other)
    assert torch.equal(found.used, expected.used)
    torch.testing.assert_close(
        found.topk_weights, expected.topk_weights, rtol=2e-6, atol=0, equal_nan=True
    )
    assert (
        (found.coreset_reuse is None)
        == (expected.coreset_reuse is None)
        == (scores.previous_coresets is None)
    )
    if found.coreset_reuse is not None and expected.coreset_reuse is not None:
        for one, other in zip(vars(found.coreset_reuse), vars(expected.coreset_reuse), strict=True):
            assert torch.equal(
                getattr(found.coreset_reuse, one), getattr(expected.coreset_reuse, other)
            )


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 100, 2 * 6 * 32 - 1])
def test_logits_that_are_not_numbers_are_left_to_torch(isa: str, bad: float, at: int):
    logits = SCORES.logits.clone()
    logits.view(-1)[at] = bad
    assert with_isa(isa, KernelRouting(replace(SCORES, logits=logits))) is None
    with pytest.raises(CoterieError, match="layer 0: router logits are NaN"):
        route(replace(SCORES, logits=logits), parse_policy("vanilla"))


@needs_kernels
def test_what_lies_otherwise_in_memory_is_left_to_torch():
    turned = replace(SCORES, logits=SCORES.logits.transpose(0, 1).contiguous().transpose(0, 1))
    learning = replace(SCORES, logits=SCORES.logits.clone().requires_grad_())
    for scores in (turned, learning, replace(SCORES, logits=SCORES.logits.double())):
        assert ops.route(scores, None, None) is None
    assert torch.equal(
        route(turned, parse_policy("vanilla")).topk_ids, route(SCORES, VANILLA).topk_ids
    )
    assert route(learning, VANILLA).topk_weights.requires_grad


@needs_kernels
def test_routing_takes_the_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(router, "route_by_mask", None)
    assert route(SCORES, VANILLA).topk_ids.shape == (12, 4)
