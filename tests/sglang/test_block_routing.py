"""The plug-in's choice of experts is the engine's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coterie.routing import Vanilla, parse_policy, route
from coterie.sglang.block_routing import LayerRouter, fill_ids, route_blocks
from coterie.sglang.live_blocks import LiveBlocks
from coterie.values import RouterSpec, Scores

EXPERTS, TOKENS, K = 16, 4, 4
SOFTMAX = RouterSpec(EXPERTS, K, "softmax", renormalise=True, epsilon=1e-20)
GROUPED = RouterSpec(EXPERTS, K, "sigmoid", renormalise=True, groups=4, topk_groups=2)
ADMITTED = RouterSpec(EXPERTS, K, "sigmoid", renormalise=True, capacity=8, block=TOKENS)
POLICIES = ("vanilla", "des-seq:k=2", "des-vote:beta=0.4", "priced-vote:price=0.3", "topk:k=2")


def live_blocks(routed: list[bool], voters: Tensor | None = None) -> LiveBlocks:
    mask = torch.tensor(routed)
    all_vote = mask.float().unsqueeze(-1).expand(-1, TOKENS)
    masked = mask.unsqueeze(-1).expand(-1, TOKENS)
    return LiveBlocks(masked, all_vote if voters is None else voters, mask)


def layer_router(spec: RouterSpec) -> LayerRouter:
    bias = None if spec is SOFTMAX else torch.linspace(-0.1, 0.1, EXPERTS).double()
    return LayerRouter(3, 1, spec, bias)


def random_logits(rows: int, seed: int) -> Tensor:
    return torch.randn(rows * TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))


@given(
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.sampled_from(POLICIES),
    st.sampled_from([SOFTMAX, GROUPED, ADMITTED]),
    st.integers(0, 99),
)
def test_each_row_routes_as_the_engine_routes_it_alone(
    routed: list[bool], text: str, spec: RouterSpec, seed: int
) -> None:
    logits, router = random_logits(len(routed), seed), layer_router(spec)
    chosen = route_blocks(logits, router, live_blocks(routed), parse_policy(text))
    ids, weights = (x.view(len(routed), TOKENS, K) for x in (chosen.ids, chosen.weights))
    for row, is_routed in enumerate(routed):
        scores = Scores(
            logits.view(-1, TOKENS, EXPERTS)[row : row + 1],
            spec,
            bias=None if router.bias is None else router.bias.float(),
        )
        alone = route(scores, parse_policy(text) if is_routed else Vanilla())
        expected = alone.topk_ids
        assert torch.equal(weights[row], alone.topk_weights)
        assert torch.equal(ids[row].long().where(expected >= 0, -1), expected)


def test_silent_tokens_elect_no_expert() -> None:
    logits = torch.zeros(TOKENS, EXPERTS)
    logits[0, :4], logits[1:, 8:12] = 9.0, 9.0
    voters = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    policy = parse_policy("des-vote:beta=0.25")
    chosen = route_blocks(logits, layer_router(SOFTMAX), live_blocks([True], voters), policy)
    assert set(chosen.ids.flatten().tolist()) == {8, 9, 10, 11}


def test_requests_of_a_batch_can_share_a_coreset() -> None:
    logits = random_logits(2, 1)
    for scope, limit in (("batch", 4), ("block", 8)):
        policy = parse_policy(f"des-vote:beta=0.25,scope={scope}")
        chosen = route_blocks(logits, layer_router(SOFTMAX), live_blocks([True, True]), policy)
        assert len(chosen.ids.unique()) == limit


@pytest.mark.parametrize("count", range(1, K + 1))
def test_filled_ids_are_different_and_keep_what_was_chosen(count: int) -> None:
    drawn = torch.rand(50, EXPERTS, generator=torch.Generator().manual_seed(count)).argsort(-1)
    ids = drawn[:, :K].clone()
    ids[:, count:] = -1
    filled = fill_ids(ids, EXPERTS)
    assert torch.equal(filled[:, :count], ids[:, :count])
    assert all(len(set(row)) == K and min(row) >= 0 for row in filled.tolist())
