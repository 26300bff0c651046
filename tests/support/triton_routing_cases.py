"""Routing by the kernels for a GPU beside plain torch: blocks to draw, and the comparison."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from coterie.routing.coreset import (
    Fixed,
    Mass,
    rank_by_votes,
    restore_votes,
    take_first,
    union_of_topm,
)
from coterie.routing.router import admitted_experts, combine_weights, select_topk, vanilla_ids
from coterie.routing.votes import VOTES
from coterie.values import CoresetRule, RouterSpec, Routing, Scores, expert_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Vote = Literal["topk-prob", "weight", "count", "full", "margin", "max"]
VOTE_NAMES: tuple[Vote, ...] = ("topk-prob", "weight", "count", "full", "margin", "max")
Block = tuple[Scores, CoresetRule | None, Tensor | None]


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
    bits = seen[-1][2] & 0x7FFFFFFF  # what the first launch left for the second
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
    admitted = admitted_experts(scores)
    excluded = None if admitted is None else ~admitted.any(dim=1)
    votes = votes if excluded is None else votes.masked_fill(excluded, 0)

    def take(votes: Tensor) -> Tensor:
        ranking = rank_by_votes(votes, safe, excluded)
        return take_first(*ranking, safe, size, rule.min_experts, excluded=excluded)

    plain = take(votes)
    if not rule.resident_bonus or scores.resident is None:
        return plain
    liked = take(votes * (1 + rule.resident_bonus * scores.resident.double()))
    return restore_votes(liked, plain, votes, rule.max_vote_loss)


@st.composite
def routers(draw: st.DrawFn) -> RouterSpec:
    experts, groups = draw(
        st.sampled_from([(8, 1), (8, 2), (64, 1), (64, 8), (96, 8), (96, 1), (128, 1), (128, 4)])
        | st.sampled_from([(256, 8), (256, 1), (5, 1), (12, 4)])
    )
    renormalise = draw(st.booleans())
    k = draw(st.integers(1, min(8, experts)))
    admits = groups == 1 and draw(st.booleans())
    return RouterSpec(
        experts=experts,
        k=k,
        activation=draw(st.sampled_from(("softmax", "sigmoid"))),
        renormalise=renormalise,
        scale=draw(st.sampled_from((1.0, 2.5))),
        groups=groups,
        topk_groups=draw(st.integers(1, groups)),
        biased_weight=draw(st.booleans()) and not renormalise,
        epsilon=draw(st.sampled_from((0.0, 1e-20))),
        capacity=draw(st.integers(k, experts)) if admits else 0,
        block=draw(st.sampled_from((3, 8, 32))),
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
        starts=torch.tensor([draw(st.integers(0, 70)) for _ in range(shape[0])]),
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
        for name in ("logits", "bias", "resident", "starts")
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
