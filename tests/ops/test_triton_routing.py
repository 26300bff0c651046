"""Routing by kernels for a GPU equals plain torch by value; interpreted where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as drawing
from hypothesis import strategies as st
from interpreter import quicken
from torch import Tensor
from torch._subclasses import FakeTensorMode

from coterie import ops
from coterie.ops import reference
from coterie.routing.coreset import Fixed, Mass, restore_votes, take_by_votes, union_of_topm
from coterie.routing.router import combine_weights, select_topk, vanilla_ids
from coterie.routing.votes import VOTES
from coterie.values import CoresetRule, PreviousCoresets, RouterSpec, Routing, Scores, expert_mask

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Vote = Literal["topk-prob", "weight", "count", "full", "margin", "max"]
VOTE_NAMES: tuple[Vote, ...] = ("topk-prob", "weight", "count", "full", "margin", "max")
Activation = Literal["softmax", "sigmoid"]
Block = tuple[Scores, CoresetRule | None, Tensor | None]


@pytest.fixture(autouse=True)
def quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


def by_kernel(scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None) -> Routing:
    return with_probability(scores, rule, vote_weight)[0]


def with_probability(
    scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None
) -> tuple[Routing, Tensor]:
    """The kernels' routing, and the probabilities that they used."""
    from coterie.ops.triton import routing

    launch, seen = routing.launch, []

    def watched(kernel: object, grid: tuple[int, ...], *args: Tensor, **constants: int) -> None:
        seen.append(args)
        launch(kernel, grid, *args, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "launch", watched)
        found = routing.route(scores, rule, vote_weight)
    assert found is not None
    bits = seen[1][1] & 0x7FFFFFFF  # what the first launch left for the second
    return found, bits.view(torch.float32).view(scores.logits.shape)


def by_torch(
    scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None, p: Tensor | None = None
) -> Routing:
    """The rule in plain torch, from the parts that policies are made of; from ``p`` on if given."""
    scores = given(scores, p)
    scores = given(replace(scores, vanilla_ids=vanilla_ids(scores)), p)
    mask = None if rule is None else coreset(scores, rule, vote_weight).unsqueeze(1)
    ids = select_topk(scores, mask)
    return Routing(
        topk_ids=ids.flatten(0, 1),
        topk_weights=combine_weights(scores, ids).flatten(0, 1),
        used=expert_mask(ids.flatten(), scores.router.experts),
        vanilla_ids=vanilla_ids(scores).flatten(0, 1),
    )


def given(scores: Scores, p: Tensor | None) -> Scores:
    fresh = replace(scores)
    if p is not None:
        vars(fresh)["probability"] = p  # what is worked out once, and kept there
    return fresh


def coreset(scores: Scores, rule: CoresetRule, vote_weight: Tensor | None) -> Tensor:
    vote_weight = torch.ones_like(scores.logits[..., 0]) if vote_weight is None else vote_weight
    if rule.union:
        return union_of_topm(scores, vote_weight, rule.union)
    size = Mass(rule.mass, rule.min_experts) if rule.mass else Fixed(rule.count)
    safe = union_of_topm(scores, vote_weight, rule.protect)
    votes = VOTES[rule.vote](scores, vote_weight, 0)
    plain = take_by_votes(votes, safe, size, rule.min_experts)
    if not rule.resident_bonus or scores.resident is None:
        return plain
    liked = take_by_votes(
        votes * (1 + rule.resident_bonus * scores.resident.double()), safe, size, rule.min_experts
    )
    return restore_votes(liked, plain, votes, rule.max_vote_loss)


@st.composite
def routers(draw: st.DrawFn) -> RouterSpec:
    experts, groups = draw(
        st.sampled_from([(8, 1), (8, 2), (64, 1), (64, 8), (96, 8), (96, 1), (128, 1), (128, 4)])
        | st.sampled_from([(256, 8), (256, 1), (5, 1), (12, 4)])
    )
    renormalise = draw(st.booleans())
    return RouterSpec(
        experts=experts,
        k=draw(st.integers(1, min(8, experts))),
        activation=draw(st.sampled_from(("softmax", "sigmoid"))),
        renormalise=renormalise,
        scale=draw(st.sampled_from((1.0, 2.5))),
        groups=groups,
        topk_groups=draw(st.integers(1, groups)),
        biased_weight=draw(st.booleans()) and not renormalise,
        epsilon=draw(st.sampled_from((0.0, 1e-20))),
    )


@st.composite
def rules(draw: st.DrawFn, router: RouterSpec) -> CoresetRule | None:
    kind = draw(st.sampled_from(("none", "union", "count", "count", "count", "mass")))
    if kind == "none":
        return None
    if kind == "union":
        return CoresetRule(union=draw(st.integers(1, router.k)))
    vote = draw(st.sampled_from(VOTE_NAMES))
    rule = partial(
        CoresetRule,
        vote=vote,
        protect=draw(st.integers(0, min(2, router.k))),
        # Halves keep every product exact, so that sums in another order are the same.
        resident_bonus=draw(st.sampled_from((0.0, 0.0, 0.5, 2.0))),
        max_vote_loss=draw(st.sampled_from((0.0, 0.02, 0.3, 1.0))),
    )
    if kind == "count" or vote == "max":
        return rule(count=draw(st.integers(1, router.experts)))
    return rule(
        mass=draw(st.sampled_from((0.3, 0.8, 1.0))),
        min_experts=draw(st.integers(1, router.experts)),
    )


@st.composite
def blocks(draw: st.DrawFn, *, most: int) -> Block:
    """A block of any size up to ``most``, with voters or without, and a rule for it."""
    router = draw(routers())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, most)))
    experts = router.experts
    logits, bias = spread(shape, experts, generator), None
    if draw(st.booleans()):
        bias = torch.randn(experts, generator=generator) / 4
    chance = torch.rand(shape, generator=generator)
    vote_weight = draw(st.sampled_from([None, (chance > 0.4).float(), chance]))
    if vote_weight is not None:
        vote_weight[:, 0] = 1.0
    scores = Scores(
        logits,
        router,
        bias=bias,
        resident=torch.rand(experts, generator=generator) < 0.4 if draw(st.booleans()) else None,
    )
    return (
        on_device(scores),
        draw(rules(router)),
        None if vote_weight is None else vote_weight.to(DEVICE),
    )


def spread(shape: tuple[int, int], experts: int, generator: torch.Generator) -> Tensor:
    """[*shape, E]: each token's logits are a shuffled grid, drawn out at random."""
    order = torch.rand(*shape, experts, generator=generator).argsort(-1)
    width = 1 + 3 * torch.rand(*shape, 1, generator=generator)
    return (order / experts - 0.5) * 2 * width


def on_device(scores: Scores) -> Scores:
    moved = {
        name: value.to(DEVICE)
        for name in ("logits", "bias", "resident")
        if (value := getattr(scores, name)) is not None
    }
    return replace(scores, **moved)


def agree(scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None) -> None:
    """Ids exactly, given the same probabilities: two exponentials may differ in the last bits."""
    found, p = with_probability(scores, rule, vote_weight)
    torch.testing.assert_close(p, scores.probability, rtol=1e-5, atol=1e-12)
    expected = by_torch(scores, rule, vote_weight, p)
    assert torch.equal(found.vanilla_ids, expected.vanilla_ids)
    assert torch.equal(found.topk_ids, expected.topk_ids)
    assert torch.equal(found.used, expected.used)
    assert found.used.dtype == torch.bool
    torch.testing.assert_close(found.topk_weights, expected.topk_weights, rtol=2e-5, atol=1e-9)


MORE_SHAPES = ((96, 8), (128, 1))
LAW = settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])


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
        pytest.param(vote, marks=pytest.mark.slow) if vote in ("weight", "count") else vote
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
    [(8, 1), (64, 1), (256, 8), *(pytest.param(*s, marks=pytest.mark.slow) for s in MORE_SHAPES)],
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
    ("groups", "kept"), [(1, 1), (4, 2), pytest.param(4, 1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
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


def test_a_coreset_of_all_experts_is_the_unmodified_model() -> None:
    generator = torch.Generator().manual_seed(4)
    router = RouterSpec(64, 8, "sigmoid", True, 2.5, 8, 4, epsilon=1e-20)
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


@settings(max_examples=12)
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
