"""Invariants of routing for every router, policy and block."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import coresets, law, policies
from score_strategies import blocks
from torch import Tensor

from coterie.errors import CoterieError
from coterie.routing import Vanilla, parse_policy, route
from coterie.routing.router import route_by_mask
from coterie.values import DecodeProgress, Policy, RouterSpec, Routing, Scores

WITHOUT_TIES = (
    "topk:k=2",
    "naee:beta=0.6",
    "des-seq:k=1",
    "xshare:beta=0.2",
    "racing:m=5",
    "priced-vote:price=0.3",
    "coreset:m=4,vote=full,tally=proportional",
    "coreset:m=1",
    "coreset:m=4,vote=full,resident_bonus=1,protect=top1",
    "mass-vote:tau=0.6,least=1",
    "mass-vote:tau=0.9,least=2,vote=full",
)


@given(blocks())
@law(60)
def test_vanilla_is_the_unmodified_model(scores: Scores):
    softmax = scores.router.activation == "softmax"
    act = scores.logits.softmax(-1) if softmax else scores.logits.sigmoid()
    torch.testing.assert_close(scores.probability, act)
    ids, weights = _unmodified(scores)
    for routing in (route(scores, Vanilla()), route_by_mask(scores, Vanilla())):
        assert torch.equal(routing.topk_ids, ids)
        assert torch.equal(routing.vanilla_ids, ids)
        # torch.sum adds the weights of a token in another order.
        torch.testing.assert_close(routing.topk_weights, weights, rtol=1e-6, atol=0)


@given(blocks(), coresets())
@law(80)
def test_every_token_stays_inside_the_coreset(scores: Scores, policy: Policy):
    coreset = policy.eligible(scores, scores.router.k).expand(scores.logits.shape)
    routing = route(scores, policy)
    inside = coreset.flatten(0, 1).gather(-1, routing.topk_ids.clamp(min=0))
    assert bool((inside | (routing.topk_ids < 0)).all())
    for row, size in enumerate(coreset[:, 0].sum(-1).tolist()):
        ids = _of_row(routing.topk_ids, scores, row)
        assert len(ids[ids >= 0].unique()) <= size


@given(blocks(), coresets())
@law(100)
def test_every_token_keeps_as_many_experts_as_the_coreset_allows(scores: Scores, policy: Policy):
    """min(k, |C|) experts each: the best by rank in C."""
    coreset = policy.eligible(scores, scores.router.k).expand(scores.logits.shape)
    ids = route(scores, policy).topk_ids.view(*scores.logits.shape[:2], -1)
    expected = coreset.sum(-1).clamp(max=scores.router.k)
    assert torch.equal((ids >= 0).sum(-1), expected)
    assert torch.equal(ids.flatten(0, 1), _choice_inside(scores, coreset))


@given(blocks())
@law()
def test_a_policy_that_allows_every_own_expert_is_vanilla_bit_for_bit(scores: Scores):
    """With a kernel and without: weights are added in one order."""
    for text in (
        "vanilla",
        f"topk:k={scores.router.k}",
        "naee:beta=0",
        "mc-moe:beta=0.5,protect=1",
        "des-vote:beta=1",
        "xshare:beta=1",
        "coreset:m=64",
        "random:beta=1",
        "proportional-vote:beta=1",
    ):
        plain, policy = route(scores, Vanilla()), parse_policy(text)
        _assert_same(route_by_mask(scores, policy), plain)
        _assert_same(route(scores, policy), plain)


@given(blocks(ties=False, rows=1), st.floats(110, 1e6))
@law(60)
def test_a_token_far_from_its_coreset_weighs_by_its_logits(scores: Scores, gap: float):
    """All its probabilities inside the coreset are 0 in fp32."""
    router = replace(scores.router, renormalise=True, epsilon=0.0, biased_weight=False)
    logits = scores.logits.repeat(1, 2, 1)  # at least two tokens
    logits[:, 1:, 1:] -= gap + logits[:, 1:, 1:].max()
    logits[:, :, 0] = torch.tensor([-200.0] + [0.0] * (logits.shape[1] - 1))
    first_votes = torch.zeros(logits.shape[:2])
    first_votes[:, 0] = 1
    scores = replace(scores, logits=logits, router=router, bias=None, voters=first_votes)
    policy = parse_policy("des-vote:beta=0.5,vote=full")
    for routing in (route(scores, policy), route_by_mask(scores, policy)):
        ids, weights = routing.topk_ids[1:], routing.topk_weights[1:]
        assert not (ids == 0).any()
        chosen = logits[0, 1:].gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        torch.testing.assert_close(weights, chosen.softmax(-1) * router.scale)


@given(blocks(), st.integers(0, 3), st.sampled_from(("block", "batch")))
@law()
def test_des_seq_with_all_top_k_experts_is_vanilla(scores: Scores, more: int, scope: str):
    policy = parse_policy(f"des-seq:k={scores.router.k + more},scope={scope}")
    _assert_same(route(scores, policy), route(scores, Vanilla()))


@given(
    blocks(),
    st.floats(0.01, 1),
    st.sampled_from(("topk-prob", "weight", "count", "full", "margin", "max")),
)
@law(60)
def test_a_share_of_experts_is_exact_for_every_block(scores: Scores, beta: float, vote: str):
    policy = parse_policy(f"des-vote:beta={beta!r},vote={vote}")
    size = policy.eligible(scores, scores.router.k).sum(-1)
    assert size.unique().tolist() == [max(1, math.floor(beta * scores.router.experts + 1e-9))]


@pytest.mark.parametrize(
    ("beta", "experts", "elected"), [(0.15, 256, 38), (0.1, 256, 25), (0.6, 64, 38), (0.4, 64, 25)]
)
def test_budgets_of_the_paper_are_exact(beta: float, experts: int, elected: int):
    scores = Scores(torch.randn(1, 32, experts), RouterSpec(experts, 8, "softmax", True))
    for name in ("des-vote", "uniform-vote", "random", "resident-vote"):
        assert int(parse_policy(f"{name}:beta={beta}").eligible(scores, 8).sum()) == elected


@given(blocks(), policies(), st.randoms(use_true_random=False))
@law(60)
def test_the_order_of_tokens_changes_nothing(scores: Scores, policy: Policy, rng):
    order = list(range(scores.logits.shape[1]))
    rng.shuffle(order)
    shuffled = _tokens(scores, torch.tensor(order))
    plain, other = route(scores, policy), route(shuffled, policy)
    shape = (*scores.logits.shape[:2], -1)
    assert torch.equal(plain.topk_ids.view(shape)[:, order], other.topk_ids.view(shape))
    assert torch.equal(plain.topk_weights.view(shape)[:, order], other.topk_weights.view(shape))


@given(
    blocks(ties=False, groups=False),
    st.sampled_from(WITHOUT_TIES).map(parse_policy),
    st.randoms(use_true_random=False),
)
@law(60)
def test_renaming_experts_renames_the_coreset(scores: Scores, policy: Policy, rng):
    names = list(range(scores.router.experts))
    rng.shuffle(names)
    renamed = replace(
        scores,
        logits=scores.logits[..., names],
        bias=None if scores.bias is None else scores.bias[names],
        resident=None if scores.resident is None else scores.resident[names],
    )
    k = scores.router.k
    before = policy.eligible(scores, k).expand(scores.logits.shape)
    assert torch.equal(before[..., names], policy.eligible(renamed, k).expand(scores.logits.shape))


@given(blocks(), policies(), st.sampled_from((math.nan, math.inf, -math.inf)), st.data())
@law()
def test_non_finite_logits_raise(scores: Scores, policy: Policy, bad: float, data):
    logits = scores.logits.clone()
    logits.view(-1)[data.draw(st.integers(0, logits.numel() - 1))] = bad
    with pytest.raises(CoterieError, match=f"layer {scores.layer}: router logits"):
        route(replace(scores, logits=logits), policy)


@given(blocks(rows=3), policies())
@law(60)
def test_a_row_in_a_batch_routes_as_it_does_alone(scores: Scores, policy: Policy):
    if getattr(getattr(policy, "election", None), "scope", "block") == "batch":
        return
    together = route(scores, policy)
    for row in range(3):
        alone = route(_rows(scores, row), policy)
        assert torch.equal(_of_row(together.topk_ids, scores, row), alone.topk_ids)
        assert torch.equal(_of_row(together.topk_weights, scores, row), alone.topk_weights)


@given(blocks(rows=3), coresets())
@law()
def test_a_finished_row_does_not_vote_for_other_rows(scores: Scores, policy: Policy):
    """Also with one coreset for all rows."""
    voters = torch.ones(scores.logits.shape[:2])
    voters[1] = 0
    scores = replace(scores, voters=voters, forward_indices=(5, 5, 5))
    other = scores.logits.clone()
    other[1] = other[1].roll(1, dims=-1) + 1
    k = scores.router.k
    before = policy.eligible(scores, k).expand(3, -1, -1)
    after = policy.eligible(replace(scores, logits=other), k).expand(3, -1, -1)
    assert torch.equal(before[[0, 2]], after[[0, 2]])


@given(blocks(), policies())
@law(60)
def test_weights_follow_the_family_and_ids_are_unique(scores: Scores, policy):
    routing = route(scores, policy)
    absent = routing.topk_ids < 0
    assert bool((routing.topk_weights[absent] == 0).all())
    assert routing.used.nonzero().flatten().tolist() == routing.topk_ids[~absent].unique().tolist()
    for token in range(len(routing.topk_ids)):
        real = routing.topk_ids[token][~absent[token]]
        assert len(real) >= 1
        assert len(set(real.tolist())) == len(real)
    if scores.router.renormalise:
        total = routing.topk_weights.sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, scores.router.scale))


def _unmodified(scores: Scores) -> tuple[Tensor, Tensor]:
    """The unmodified routing, one token at a time and with plain numbers."""
    everywhere = torch.ones_like(scores.logits, dtype=torch.bool)
    ids = _choice_inside(scores, everywhere)
    router = scores.router
    weights = []
    for token, p, c in zip(ids, scores.probability.flatten(0, 1), _rank(scores), strict=True):
        weight = (torch.tensor(c) if router.biased_weight else p)[token]
        if router.renormalise:
            weight = weight / (weight.sum() + router.epsilon)
        weights.append(weight * router.scale)
    return ids, torch.stack(weights)


def _choice_inside(scores: Scores, coreset: Tensor) -> Tensor:
    """The best of the coreset in the model's groups, then the best of its rest."""
    router, size = scores.router, scores.router.experts // scores.router.groups
    ids = []
    for c, allowed in zip(_rank(scores), coreset.flatten(0, 1).tolist(), strict=True):
        groups = [sorted(c[g * size : (g + 1) * size])[-2:] for g in range(router.groups)]
        score = [torch.tensor(best).sum().item() for best in groups]
        top_groups = sorted(range(router.groups), key=lambda g: (-score[g], g))[
            : router.topk_groups
        ]
        order = sorted(
            (e for e in range(router.experts) if allowed[e]),
            key=lambda e: (e // size not in top_groups, -c[e], e),
        )
        ids.append((order + [-1] * router.k)[: router.k])
    return torch.tensor(ids)


def _rank(scores: Scores) -> list[list[float]]:
    p = scores.probability
    return (p if scores.bias is None else p + scores.bias).flatten(0, 1).tolist()


def _of_row(flat: Tensor, scores: Scores, row: int) -> Tensor:
    return flat.view(*scores.logits.shape[:2], -1)[row]


def _tokens(scores: Scores, order: Tensor) -> Scores:
    return _indexed(scores, lambda tensor: tensor[:, order])


def _rows(scores: Scores, row: int) -> Scores:
    alone = _indexed(scores, lambda tensor: tensor[row : row + 1])
    return replace(alone, forward_indices=(scores.forward_indices[row],))


def _indexed(scores: Scores, take) -> Scores:
    def maybe(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else take(tensor)

    progress = scores.progress or DecodeProgress()
    return replace(
        scores,
        logits=take(scores.logits),
        voters=maybe(scores.voters),
        importance=maybe(scores.importance),
        progress=DecodeProgress(
            masked=maybe(progress.masked),
            after_eos=maybe(progress.after_eos),
            uncertainty=maybe(progress.uncertainty),
        ),
    )


def _assert_same(one: Routing, other: Routing) -> None:
    assert torch.equal(one.topk_ids, other.topk_ids)
    assert torch.equal(one.topk_weights, other.topk_weights)
    assert torch.equal(one.used, other.used)
