"""Routing by kernels for a GPU equals plain torch by value; interpreted where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as drawing
from hypothesis import strategies as st
from interpreter import quicken
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton_routing_cases import (
    DEVICE,
    VOTE_NAMES,
    Block,
    Vote,
    agree,
    blocks,
    by_kernel,
    by_torch,
    on_device,
    spread,
)

from coterie import ops
from coterie.ops import reference
from coterie.values import CoresetRule, PreviousCoresets, RouterSpec, Scores

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")
Activation = Literal["softmax", "sigmoid"]


@pytest.fixture(autouse=True)
def quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


GROUPED = RouterSpec(64, 8, "sigmoid", True, 2.5, 8, 4, epsilon=1e-20)
ADMITTING = RouterSpec(64, 8, "sigmoid", True, 2.5, epsilon=1e-20, capacity=12, block=4)
MORE_SHAPES = ((64, 1), (96, 8), (128, 1))
LAW = settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])


@LAW
@drawing(blocks(most=12))
def test_kernels_route_as_torch_does(drawn: Block) -> None:
    agree(*drawn)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@drawing(blocks(most=100))
def test_kernels_route_as_torch_does_on_many_blocks(drawn: Block) -> None:
    agree(*drawn)


@pytest.mark.parametrize(
    "vote",
    [
        pytest.param(vote, marks=pytest.mark.slow) if vote in ("weight", "count", "max") else vote
        for vote in VOTE_NAMES
    ],
)
def test_every_vote_and_what_goes_with_it(vote: Vote) -> None:
    scores, vote_weight = voted_block(vote)
    rule = CoresetRule(vote, count=5, protect=1, resident_bonus=2.0, max_vote_loss=0.02)
    agree(scores, rule, vote_weight)
    if vote in ("topk-prob", "margin"):  # the others: below
        agree(scores, CoresetRule(vote, mass=0.7, min_experts=2, protect=1), vote_weight)


@pytest.mark.slow
@pytest.mark.parametrize("vote", VOTE_NAMES)
def test_every_vote_without_some_of_what_goes_with_it(vote: Vote) -> None:
    scores, vote_weight = voted_block(vote)
    agree(scores, CoresetRule(vote, count=5), None)
    agree(scores, CoresetRule(vote, count=5, protect=2), vote_weight)
    if vote != "max":
        rule = CoresetRule(vote, mass=0.7, min_experts=2, resident_bonus=0.5, max_vote_loss=0.3)
        agree(scores, rule, vote_weight)


def voted_block(vote: Vote) -> tuple[Scores, Tensor]:
    """Two sequences of five tokens, and the weights of their votes."""
    generator = torch.Generator().manual_seed(sum(map(ord, vote)))
    router = RouterSpec(12, 3, "sigmoid", True, groups=4, topk_groups=2, epsilon=1e-20)
    scores = on_device(
        Scores(
            spread((2, 5), 12, generator),
            router,
            bias=torch.randn(12, generator=generator) / 4,
            resident=torch.rand(12, generator=generator) < 0.5,
        )
    )
    vote_weight = torch.tensor(
        [[1.0, 0.0, 0.3, 0.7, 0.0], [0.0, 0.5, 0.0, 0.0, 0.0]], device=DEVICE
    )
    return scores, vote_weight


@pytest.mark.parametrize(
    ("experts", "groups"),
    [(8, 1), (256, 8), *(pytest.param(*s, marks=pytest.mark.slow) for s in MORE_SHAPES)],
)
@pytest.mark.parametrize("activation", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_published_shapes(experts: int, groups: int, activation: Activation) -> None:
    """With 70 tokens, programs are of another shape and have a whole chunk of parts to add up."""
    generator = torch.Generator().manual_seed(experts)
    router = RouterSpec(
        experts, min(8, experts - 1), activation, True, 2.5, groups, max(1, groups // 2)
    )
    tokens = 70 if experts == 64 else 9
    scores = on_device(Scores(spread((1, tokens), experts, generator), router))
    for rule in (None, CoresetRule(count=math.ceil(0.15 * experts), protect=1)):
        agree(scores, rule, None)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200, 512])
@pytest.mark.parametrize("experts", [64, 256])
def test_blocks_of_any_size(tokens: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    router = RouterSpec(experts, 8, "softmax", True)
    scores = on_device(Scores(spread((1, tokens), experts, generator), router))
    agree(scores, CoresetRule(count=experts // 6), None)
    agree(scores, CoresetRule("weight", mass=0.8, min_experts=8, protect=1), None)
    agree(scores, None, None)


@pytest.mark.parametrize(
    ("activation", "groups", "kept"),
    [
        *(("softmax", 1, 1), ("sigmoid", 4, 2)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("softmax", 4, 2), ("softmax", 4, 1), ("sigmoid", 1, 1), ("sigmoid", 4, 1))
        ),
    ],
)
def test_ties_go_to_the_lower_expert(activation: Activation, groups: int, kept: int) -> None:
    """Equal logits are equal however they are computed: three values, and nothing else decides."""
    generator = torch.Generator().manual_seed(3)
    router = RouterSpec(24, 7, activation, False, groups=groups, topk_groups=kept)
    logits = torch.randint(0, 3, (1, 4, 24), generator=generator).float()
    scores = on_device(Scores(logits, router))
    agree(scores, None, None)
    agree(scores, CoresetRule("count", count=9, protect=1), None)
    agree(scores, CoresetRule("count", mass=0.5), None)
    agree(scores, CoresetRule(union=2), None)
    if activation == "sigmoid":  # a softmax adds up a token's other logits, in some order
        agree(scores, CoresetRule("max", count=4), None)


@pytest.mark.parametrize(
    "vote",
    [
        vote if vote in ("topk-prob", "full") else pytest.param(vote, marks=pytest.mark.slow)
        for vote in VOTE_NAMES
    ],
)
def test_every_vote_inside_the_experts_that_blocks_admit(vote: Vote) -> None:
    """One row ends a block and begins another; the other lies inside one."""
    scores, vote_weight = voted_block(vote)
    router = RouterSpec(12, 3, "sigmoid", True, epsilon=1e-20, capacity=4, block=8)
    scores = on_device(replace(scores, router=router, starts=torch.tensor([6, 64])))
    rule = CoresetRule(vote, count=9, protect=1, resident_bonus=2.0, max_vote_loss=0.02)
    agree(scores, rule, vote_weight)
    if vote == "max":
        agree(scores, CoresetRule(vote, count=3), vote_weight)
    if vote == "margin":
        agree(scores, CoresetRule(vote, mass=0.7, min_experts=5, protect=1), vote_weight)
    if vote == "topk-prob":
        agree(scores, CoresetRule(union=2), vote_weight)
        agree(scores, None, None)


@pytest.mark.parametrize("router", [GROUPED, ADMITTING], ids=["groups", "capacity"])
def test_a_coreset_of_all_experts_is_the_unmodified_model(router: RouterSpec) -> None:
    generator = torch.Generator().manual_seed(4)
    bias = torch.randn(64, generator=generator) / 4
    scores = on_device(Scores(torch.randn(1, 6, 64, generator=generator), router, bias=bias))
    plain, full = by_kernel(scores, None, None), by_kernel(scores, CoresetRule(count=64), None)
    for name in ("topk_ids", "topk_weights", "used", "vanilla_ids"):
        assert torch.equal(getattr(plain, name), getattr(full, name)), name


def test_votes_add_up_alike_in_any_order_and_are_rounded_to_the_even() -> None:
    """Tokens may come in any order; and tiny votes, which fp32 holds with halves, are rounded as
    torch rounds them: a vote more or less would break the ties between these experts."""
    generator = torch.Generator().manual_seed(5)
    logits = -12 - 2 * torch.rand(1, 9, 16, generator=generator)
    logits[..., 8:] = logits[..., :8]
    scores = on_device(Scores(logits, RouterSpec(16, 16, "sigmoid", False)))
    order = torch.randperm(9, generator=generator)
    moved = replace(scores, logits=scores.logits[:, order])
    for m in (1, 11):
        found = by_kernel(scores, CoresetRule(count=m), None)
        assert torch.equal(found.used, by_kernel(moved, CoresetRule(count=m), None).used)
        assert int(found.used.sum()) == m
    agree(scores, CoresetRule(count=5), None)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_token_far_from_its_coreset_weighs_by_its_logits(activation: Activation) -> None:
    logits = torch.linspace(-1, 1, 16).repeat(1, 3, 1)
    logits[:, 1:, 1:] -= 300
    logits[:, :, 0] = torch.tensor([-200.0, 0.0, 0.0])
    scores = on_device(Scores(logits, RouterSpec(16, 3, activation, True)))
    call = (scores, CoresetRule("full", count=4), torch.tensor([[1.0, 0.0, 0.0]], device=DEVICE))
    assert by_kernel(*call).topk_weights.isfinite().all()
    agree(*call)


@pytest.mark.parametrize(
    ("strange", "activation"),
    [(math.nan, "softmax"), (math.inf, "sigmoid"), (-math.inf, "softmax")],
)
def test_non_finite_logits_give_nan_weights_and_no_vote(
    strange: float, activation: Activation
) -> None:
    generator = torch.Generator().manual_seed(6)
    logits = spread((1, 6), 16, generator)
    logits[0, 2, 5] = strange
    scores = on_device(Scores(logits, RouterSpec(16, 3, activation, True)))
    sane = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 1.0]], device=DEVICE)
    for rule in (
        None,
        CoresetRule(count=4, protect=1),
        CoresetRule("max", count=4),
        CoresetRule(union=3),
    ):
        found = by_kernel(scores, rule, None)
        assert bool(found.topk_weights[2].isnan().all())
        others = [0, 1, 3, 4, 5]
        clean = replace(scores, logits=scores.logits.nan_to_num(0.0, 0.0, 0.0))
        expected = by_torch(clean, rule, sane)
        assert torch.equal(found.topk_ids[others], expected.topk_ids[others])
        assert 0 <= int(found.topk_ids.min()) <= int(found.topk_ids.max()) < 16


def test_unsupported_inputs_are_left_to_torch() -> None:
    from coterie.ops.triton import route

    scores = Scores(torch.zeros(1, 3, 8), RouterSpec(8, 2, "softmax", False))
    assert route(replace(scores, logits=scores.logits.double()), None, None) is None
    learning = scores.logits.clone().requires_grad_()
    assert route(replace(scores, logits=learning), None, None) is None
    assert route(replace(scores, logits=scores.logits[:, :0]), None, None) is None
    assert route(scores, CoresetRule("max", mass=0.5, protect=1), None) is None
    assert route(scores, CoresetRule("full", count=4, protect=1, max_experts=3), None) is None
    had = PreviousCoresets(0.1, torch.ones(1, 8, dtype=torch.bool))
    assert route(replace(scores, previous_coresets=had), CoresetRule(count=4), None) is None
    inside = RouterSpec(8, 2, "softmax", False, capacity=3)
    assert route(replace(scores, router=inside), CoresetRule("max", mass=0.5), None) is None
    wide = RouterSpec(2048, 2, "softmax", False)
    assert route(Scores(torch.zeros(1, 3, 2048), wide), None, None) is None


def test_scores_on_a_gpu_are_routed_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from coterie.ops import triton

    rules: list[object] = []
    monkeypatch.setattr(triton, "route", lambda scores, rule, weight: rules.append(rule))
    with FakeTensorMode():
        on_gpu = Scores(torch.zeros(1, 3, 8, device="cuda"), RouterSpec(8, 2, "softmax", False))
    ops.route(on_gpu, CoresetRule(count=3), None)
    ops.route(Scores(torch.zeros(1, 3, 8), on_gpu.router), None, None)
    assert rules == [CoresetRule(count=3)]


@settings(max_examples=8)
@drawing(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    voters=st.sampled_from(("absent", "some", "few", "none", "bool")),
    voter_filter=st.sampled_from(("absent", "some", "few", "none", "bool", "inverted")),
)
def test_vote_weights_equal_plain_torch(
    rows: int, tokens: int, seed: int, voters: str, voter_filter: str
) -> None:
    from coterie.ops.triton import vote_weights

    generator = torch.Generator().manual_seed(seed)

    def drawn(how: str) -> Tensor | None:
        chance = torch.rand(rows, tokens, generator=generator).to(DEVICE)
        few = chance * (chance > 1 - 1 / tokens)
        masks = {"bool": chance > 0.5, "inverted": few == 0}
        return {"some": chance, "few": few, "none": chance * 0, **masks}.get(how)

    weights, mask = drawn(voters), drawn(voter_filter)
    if weights is None and mask is None:
        weights = torch.zeros(rows, tokens, device=DEVICE)
    inverted = voter_filter == "inverted"
    expected = reference.vote_weights(weights, mask, invert_filter=inverted)
    assert torch.equal(vote_weights(weights, mask, invert_filter=inverted), expected)
