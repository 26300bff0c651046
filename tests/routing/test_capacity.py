"""Routing by block: a block admits some experts, and its tokens and policies choose among them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import coresets, law, policies
from score_strategies import blocks
from shared_data import golden
from torch import Tensor

from coterie.routing import Vanilla, parse_policy, route
from coterie.routing.router import admitted_experts, route_by_mask, vanilla_ids
from coterie.values import Policy, RouterSpec, Scores

ALL_EXPERTS = ("des-vote:beta=1", "xshare:beta=1", "proportional-vote:beta=1", "des-seq:k=8")


@st.composite
def block_routed(draw: st.DrawFn, *, one_block: bool = False) -> Scores:
    """Scores of a router with a capacity; its blocks start anywhere in the window."""
    scores = draw(blocks(groups=False))
    rows, _, experts = scores.logits.shape
    block = draw(st.sampled_from((4, 8, 32)))
    capacity = draw(st.integers(scores.router.k, experts))
    starts = torch.tensor([draw(st.integers(0, 70)) for _ in range(rows)])
    if one_block:
        block, starts = 64, None
    return replace(
        scores, router=replace(scores.router, capacity=capacity, block=block), starts=starts
    )


@given(block_routed())
@law(100)
def test_tokens_choose_their_best_experts_among_the_best_of_their_block(scores: Scores) -> None:
    if scores.router.capacity:
        assert admitted_experts(scores).tolist() == _admitted(scores)  # type: ignore[union-attr]
    for routing in (route(scores, Vanilla()), route_by_mask(scores, Vanilla())):
        assert routing.topk_ids.tolist() == _expected_ids(scores)
        assert torch.equal(routing.vanilla_ids, routing.topk_ids)


@given(block_routed(), st.sampled_from(ALL_EXPERTS))
@law(60)
def test_a_coreset_of_all_experts_is_the_models_own_routing(scores: Scores, text: str) -> None:
    plain = route(scores, Vanilla())
    routing = route(scores, parse_policy(text))
    assert torch.equal(routing.topk_ids, plain.topk_ids)
    torch.testing.assert_close(routing.topk_weights, plain.topk_weights, rtol=1e-6, atol=0)


@given(block_routed(one_block=True), coresets())
@law(100)
def test_a_policy_elects_among_the_admitted_experts(scores: Scores, policy: Policy) -> None:
    scores = replace(scores, logits=scores.logits[:1], voters=None, progress=None)
    scores = replace(scores, importance=None, forward_indices=(3,))
    policy = _without_voters(policy)
    admitted = admitted_experts(scores)
    allowed = policy.eligible(scores, scores.router.k)
    if admitted is None or allowed.numel() == 1:
        return
    assert not bool((allowed & ~admitted).any())
    beta = getattr(policy, "beta", None)
    if isinstance(beta, float) and policy.election.max_experts is None:  # type: ignore[attr-defined]
        own = vanilla_ids(scores)[..., 0].unique().numel()
        protected = own if policy.election.protect == "top1" else 0  # type: ignore[attr-defined]
        share = max(1, math.floor(beta * scores.router.experts + 1e-9), protected)
        assert int(allowed.sum()) == min(share, scores.router.capacity)


@given(block_routed(), policies())
@law(100)
def test_kernels_route_as_the_mask_does(scores: Scores, policy: Policy) -> None:
    routing, expected = route(scores, policy), route_by_mask(scores, policy)
    assert torch.equal(routing.topk_ids, expected.topk_ids)
    assert torch.equal(routing.vanilla_ids, expected.vanilla_ids)
    assert torch.equal(routing.used, expected.used)
    torch.testing.assert_close(routing.topk_weights, expected.topk_weights, rtol=1e-6, atol=0)


def test_reference_blocks_admit_and_weigh_the_same_experts() -> None:
    document = json.loads((golden("llada22") / "block-routing.json").read_text())
    for case in document["cases"]:
        router = RouterSpec(
            *(case["experts"], case["top_k"], "sigmoid", True, case["scale"]),
            epsilon=1e-20,
            capacity=case["capacity"],
            block=case["block"],
        )
        scores = Scores(torch.tensor(case["logits"])[None], router, bias=torch.tensor(case["bias"]))
        admitted = admitted_experts(scores)[0, :: case["block"]]  # type: ignore[index]
        assert [row.nonzero()[:, 0].tolist() for row in admitted] == case["allowed_per_block"]
        for routing in (route(scores, Vanilla()), route_by_mask(scores, Vanilla())):
            ours = _dense(routing.topk_ids, routing.topk_weights, case["experts"])
            theirs = _dense(
                torch.tensor(case["ids"]), torch.tensor(case["weights"]), case["experts"]
            )
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("start", [0, 31, 33])
def test_blocks_lie_at_multiples_of_their_size(start: int) -> None:
    """Two tokens that want other experts share them only inside one block."""
    logits = torch.tensor([[[3.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.5, 2.0]]])
    router = RouterSpec(4, 1, "sigmoid", True, capacity=1, block=32)
    routing = route(Scores(logits, router, starts=torch.tensor([start])), Vanilla())
    assert routing.topk_ids.flatten().tolist() == ([0, 2] if start == 31 else [2, 2])


def _without_voters(policy: Policy) -> Policy:
    election = replace(policy.election, voters="all", scope="block")  # type: ignore[attr-defined]
    return replace(policy, election=election)  # type: ignore[type-var]


def _blocks(scores: Scores) -> list[list[int]]:
    starts = scores.starts.tolist() if scores.starts is not None else [0] * len(scores.logits)
    tokens = range(scores.logits.shape[1])
    return [[(start + token) // scores.router.block for token in tokens] for start in starts]


def _admitted(scores: Scores) -> list[list[list[bool]]]:
    rank, experts = scores.selection_scores.tolist(), range(scores.router.experts)
    result = []
    for row, blocks_of in zip(rank, _blocks(scores), strict=True):
        masks = {}
        for block in set(blocks_of):
            own = [r for r, b in zip(row, blocks_of, strict=True) if b == block]
            order = sorted(experts, key=lambda e: (-max(r[e] for r in own), e))
            masks[block] = [e in order[: scores.router.capacity] for e in experts]
        result.append([masks[block] for block in blocks_of])
    return result


def _expected_ids(scores: Scores) -> list[list[int]]:
    experts, k = range(scores.router.experts), scores.router.k
    every = [[[True] * len(experts)] * scores.logits.shape[1]] * len(scores.logits)
    admitted = _admitted(scores) if scores.router.capacity else every
    return [
        sorted((e for e in experts if mask[e]), key=lambda e: (-rank[e], e))[:k]
        for row, masks in zip(scores.selection_scores.tolist(), admitted, strict=True)
        for rank, mask in zip(row, masks, strict=True)
    ]


def _dense(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    return torch.zeros(len(ids), experts).scatter(-1, ids, weights)
