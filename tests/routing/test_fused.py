"""Kernel forms of policies, and kernels that route like plain torch."""

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


def kernel_routing(text: str, scores: Scores = SCORES) -> KernelRouting | None:
    policy = parse_policy(text)
    return policy.kernel_rule(scores, scores.router.k) if isinstance(policy, KernelPolicy) else None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("vanilla", None),
        ("des-seq:k=4", None),
        ("des-seq:k=3", CoresetRule(union=3)),
        ("des-seq:k=4,voters=before-eos", CoresetRule(union=4)),
        ("des-vote:beta=0.15", CoresetRule(count=4, max_vote_loss=0.02)),
        (
            "des-vote:beta=0.5,vote=weight,protect=top1",
            CoresetRule("weight", 0, 16, protect=1, max_vote_loss=0.02),
        ),
        ("uniform-vote:beta=0.01", CoresetRule("count", count=1, max_vote_loss=0.02)),
        ("xshare:beta=1", CoresetRule("full", count=32, protect=1, max_vote_loss=0.02)),
        ("racing:m=48", CoresetRule("max", count=32, max_vote_loss=0.02)),
        ("mass-vote:tau=0.8", CoresetRule(mass=0.8, min_experts=4, max_vote_loss=0.02)),
        ("mass-vote:tau=0.8,least=40", CoresetRule(mass=0.8, min_experts=32, max_vote_loss=0.02)),
        (
            "resident-vote:beta=0.5,lam=2,eps=0.1",
            CoresetRule(count=16, resident_bonus=2.0, max_vote_loss=0.1),
        ),
        ("coreset:m=3,vote=margin", CoresetRule("margin", count=3, max_vote_loss=0.02)),
        ("des-vote:beta=0.5,most=7", CoresetRule(count=7, max_vote_loss=0.02)),
        (
            "xshare:beta=0.5,most=7",
            CoresetRule("full", count=7, protect=1, max_vote_loss=0.02, max_experts=7),
        ),
        ("des-seq:k=4,most=7", CoresetRule(union=4, max_vote_loss=0.02, max_experts=7)),
        ("des-vote:beta=0.5,max=slots", CoresetRule(count=16, max_vote_loss=0.02)),
    ],
)
def test_the_kernel_rule_of_a_policy(text: str, rule: CoresetRule | None):
    routing = kernel_routing(text)
    assert routing is not None
    assert routing.rule == rule


@pytest.mark.parametrize(
    "text",
    ["naee:beta=0.6", "mc-moe:beta=0.6", "random:beta=0.5", "coreset:m=3,vote=random"],
)
def test_policies_without_a_kernel_rule(text: str):
    assert kernel_routing(text) is None


def test_a_list_of_budgets_gives_the_rule_of_the_layer():
    routing = kernel_routing("des-vote:beta=0.25/0.5", replace(SCORES, moe_index=1))
    assert routing is not None
    assert routing.rule == CoresetRule(count=16, max_vote_loss=0.02)


def test_vote_weights_are_1_unless_voters_are_limited():
    voters = torch.tensor([[1.0] * 3 + [0.0] * 3] * 2)
    filled = torch.tensor([[False] * 2 + [True] * 4] * 2)
    scores = replace(SCORES, voters=voters, progress=DecodeProgress(after_eos=filled))
    all_vote, engine = (
        kernel_routing("des-vote:beta=0.5"),
        kernel_routing("des-vote:beta=0.5", scores),
    )
    before_eos = kernel_routing("des-vote:beta=0.5,voters=before-eos", scores)
    assert all_vote is not None
    assert engine is not None
    assert before_eos is not None
    assert all_vote.vote_weight is None
    assert engine.vote_weight is not None
    assert before_eos.vote_weight is not None
    assert torch.equal(engine.vote_weight, voters)
    assert torch.equal(before_eos.vote_weight, torch.tensor([[1.0] * 2 + [0.0] * 4] * 2))


def test_rows_that_share_a_coreset_are_one_sequence():
    routing = kernel_routing("des-vote:beta=0.5,scope=batch")
    assert routing is not None
    assert torch.equal(routing.scores.logits, SCORES.logits.view(1, 12, 32))


def test_route_uses_the_kernel_and_else_torch(monkeypatch):
    rules: list[CoresetRule | None] = []
    expected = route_by_mask(SCORES, parse_policy("vanilla"))

    def kernel(
        scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None
    ) -> Routing | None:
        rules.append(rule)
        return expected if rule is None else None

    monkeypatch.setattr(ops, "route", kernel)
    assert route(SCORES, parse_policy("vanilla")) is expected
    plain = route(SCORES, parse_policy("des-seq:k=1"))
    assert torch.equal(plain.topk_ids, route_by_mask(SCORES, parse_policy("des-seq:k=1")).topk_ids)
    assert rules == [None, CoresetRule(union=1)]


def test_a_custom_policy_needs_no_kernel_rule():
    @dataclass(frozen=True)
    class Evens:
        def eligible(self, scores: Scores, k: int) -> Tensor:
            return (torch.arange(scores.router.experts) % 2 == 0).view(1, 1, -1)

    policy: Policy = Evens()
    ids = route(SCORES, policy).topk_ids
    assert bool((ids % 2 == 0).all())


@st.composite
def odd_blocks(draw: st.DrawFn) -> Scores:
    """Scores of any shape, mostly with ties: 1 - 300 experts, 1 - 64 tokens, 1 - 4 rows."""
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
    if router.topk_groups == groups and draw(st.booleans()):
        capacity = draw(st.integers(router.k, experts))
        block = draw(st.sampled_from((1, 3, 8, 32, 100)))
        router = replace(router, capacity=capacity, block=block)
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 64)))
    starts = torch.tensor([draw(st.integers(0, 200)) for _ in range(shape[0])])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    coarse = draw(st.sampled_from((0.0, 1.0, 4.0)))
    logits = draw(st.sampled_from((2.0, 2.0, 60.0))) * torch.randn(
        *shape, experts, generator=generator
    )
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
        previous_coresets=draw(
            st.sampled_from((None, previous_coresets(shape[0], experts, generator)))
        ),
        forward_indices=(1,) * shape[0],
        starts=draw(st.sampled_from((None, starts))),
    )


def previous_coresets(rows: int, experts: int, generator: torch.Generator) -> PreviousCoresets:
    """Coresets of any size; some rows have none."""
    coresets = torch.rand(rows, experts, generator=generator) < torch.rand(
        rows, 1, generator=generator
    )
    reuse_tolerance = float(torch.rand((), generator=generator))
    return PreviousCoresets(
        reuse_tolerance, coresets & (torch.rand(rows, 1, generator=generator) < 0.8)
    )


@st.composite
def kernel_policies(draw: st.DrawFn) -> str:
    """A policy with a kernel rule: any vote, size, protection, bonus, voters and scope."""
    size = draw(st.sampled_from(("beta=0.15", "beta=0.6", "m=5", "tau=0.8", "tau=0.5,least=9")))
    options = {
        "vote": draw(st.sampled_from(("topk-prob", "weight", "count", "full", "margin", "max"))),
        "protect": draw(st.sampled_from(("none", "top1"))),
        "voters": draw(st.sampled_from(("all", "before-eos", "masked", "uncertain"))),
        "scope": draw(st.sampled_from(("block", "batch"))),
        "resident_bonus": draw(st.sampled_from((0, 0.5, 2))),
        "max_vote_loss": draw(st.sampled_from((0, 0.02, 0.3))),
    }
    if draw(st.booleans()):
        options["max"] = draw(st.sampled_from((1, 7, "slots")))
    coreset = f"coreset:{size},{','.join(f'{name}={value}' for name, value in options.items())}"
    union = ("voters", "scope", "max")
    union_options = ",".join(f"{name}={options[name]}" for name in union if name in options)
    first = f"des-seq:k={draw(st.integers(1, 9))},{union_options}"
    return draw(st.sampled_from((coreset, coreset, first, "vanilla")))


def with_isa(isa: str, routing: KernelRouting) -> Routing | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COTERIE_ISA", isa)
        return ops.route(routing.scores, routing.rule, routing.vote_weight)


def is_without_kernel(scores: Scores, text: str) -> bool:
    """A limited union whose voters are not those of its votes, or a batch of admitting blocks."""
    has_batch = "scope=batch" in text and scores.router.capacity > 0
    return has_batch or (text.startswith("des-seq") and "max=" in text)


@needs_kernels
@given(odd_blocks(), kernel_policies(), st.sampled_from(ISAS))
@law(60)
def test_the_kernel_routes_like_plain_torch(scores: Scores, text: str, isa: str):
    if text == "vanilla" or "scope=batch" in text:  # these reuse no coresets
        scores = replace(scores, previous_coresets=None)
    routing, expected = kernel_routing(text, scores), route_by_mask(scores, parse_policy(text))
    if routing is None:
        assert is_without_kernel(scores, text)
        return
    result = with_isa(isa, routing)
    assert result is not None
    for one, other in (
        (result.topk_ids, expected.topk_ids),
        (result.vanilla_ids, expected.vanilla_ids),
    ):
        assert torch.equal(one, other)
    assert torch.equal(result.used, expected.used)
    torch.testing.assert_close(result.topk_weights, expected.topk_weights, rtol=2e-6, atol=0)
    assert (
        (result.coreset_reuse is None)
        == (expected.coreset_reuse is None)
        == (scores.previous_coresets is None)
    )
    if result.coreset_reuse is not None and expected.coreset_reuse is not None:
        for one, other in zip(
            vars(result.coreset_reuse), vars(expected.coreset_reuse), strict=True
        ):
            assert torch.equal(
                getattr(result.coreset_reuse, one), getattr(expected.coreset_reuse, other)
            )


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 100, 2 * 6 * 32 - 1])
def test_non_finite_logits_have_no_kernel_and_raise(isa: str, bad: float, at: int):
    logits = SCORES.logits.clone()
    logits.view(-1)[at] = bad
    assert with_isa(isa, KernelRouting(replace(SCORES, logits=logits))) is None
    with pytest.raises(CoterieError, match="layer 0: router logits are NaN"):
        route(replace(SCORES, logits=logits), parse_policy("vanilla"))


@needs_kernels
def test_other_strides_and_dtypes_have_no_kernel():
    transposed = replace(SCORES, logits=SCORES.logits.transpose(0, 1).contiguous().transpose(0, 1))
    with_grad = replace(SCORES, logits=SCORES.logits.clone().requires_grad_())
    for scores in (transposed, with_grad, replace(SCORES, logits=SCORES.logits.double())):
        assert ops.route(scores, None, None) is None
    assert torch.equal(
        route(transposed, parse_policy("vanilla")).topk_ids, route(SCORES, VANILLA).topk_ids
    )
    assert route(with_grad, VANILLA).topk_weights.requires_grad


@needs_kernels
def test_route_uses_the_kernel_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(router, "route_by_mask", None)
    assert route(SCORES, VANILLA).topk_ids.shape == (12, 4)


@needs_kernels
@pytest.mark.parametrize("text", ["vanilla", "des-vote:beta=0.3", "des-seq:k=2", "topk:k=2"])
def test_a_scale_of_each_expert_multiplies_its_weights_and_changes_no_choice(text: str) -> None:
    scale = torch.rand(32, generator=torch.Generator().manual_seed(3)) + 0.5
    plain = route(SCORES, parse_policy(text))
    scaled = replace(SCORES, expert_scale=scale)
    for routing in (route(scaled, parse_policy(text)), route_by_mask(scaled, parse_policy(text))):
        assert torch.equal(routing.topk_ids, plain.topk_ids)
        expected = plain.topk_weights * scale[plain.topk_ids.clamp(min=0)]
        torch.testing.assert_close(routing.topk_weights, expected)
