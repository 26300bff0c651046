"""The plug-in's choice of experts is the engine's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coterie.errors import ConfigError
from coterie.routing import POLICIES, Vanilla, parse_policy, route
from coterie.sglang.block_routing import LayerRouter, fill_ids, route_blocks
from coterie.sglang.expert_counts import ExpertTotals
from coterie.sglang.live_blocks import BlockRules, LiveBlocks
from coterie.sglang.settings import check_policy
from coterie.values import RouterSpec, Scores

EXPERTS, TOKENS, K = 16, 4, 4
SOFTMAX = RouterSpec(EXPERTS, K, "softmax", renormalise=True, epsilon=1e-20)
GROUPED = RouterSpec(EXPERTS, K, "sigmoid", renormalise=True, groups=4, topk_groups=2)
ADMITTED = RouterSpec(EXPERTS, K, "sigmoid", renormalise=True, capacity=8, block=TOKENS)
OPTIONS = {  # that a policy needs; one with other options reads what SGLang does not offer
    "vanilla": "", "topk": "k=2", "naee": "beta=0.1", "des-seq": "k=2", "des-vote": "beta=0.4",
    "uniform-vote": "beta=0.4", "xshare": "beta=0.4", "racing": "m=6", "mass-vote": "tau=0.5",
    "proportional-vote": "beta=0.2,protect=top1", "priced-vote": "price=0.3,protect=top1",
    "coreset": "beta=0.4,voters=masked,scope=batch",
}  # fmt: skip
REFUSED = {"mc-moe": "beta=0.4", "random": "beta=0.4", "resident-vote": "beta=0.4"}
SPECS = ("vanilla", "des-seq:k=2", "des-vote:beta=0.4", "priced-vote:price=0.3", "topk:k=2")


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
    st.sampled_from(SPECS),
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


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize(
    "spec", [SOFTMAX, GROUPED, ADMITTED], ids=["softmax", "grouped", "admitted"]
)
def test_a_graph_can_capture_what_is_not_refused(name: str, spec: RouterSpec) -> None:
    """A meta tensor has no values: reading one fails, and so does a shape that depends on one."""
    if name in REFUSED:
        with pytest.raises(ConfigError, match="does not work in SGLang"):
            check_policy(parse_policy(f"{name}:{REFUSED[name]}"))
        return
    policy = parse_policy(f"{name}:{OPTIONS[name]}".removesuffix(":"))
    check_policy(policy)
    with torch.device("meta"):
        tokens = torch.zeros(3, TOKENS, dtype=torch.int64)
        blocks = LiveBlocks.of(tokens, tokens, tokens[:, 0], BlockRules(mask_id=5))
        router = LayerRouter(3, 1, spec, None if spec is SOFTMAX else torch.zeros(EXPERTS))
        chosen = route_blocks(torch.zeros(3 * TOKENS, EXPERTS), router, blocks, policy)
        ExpertTotals((3,), torch.device("meta")).add(chosen.scores, chosen.routing, blocks.routed)
    assert chosen.ids.shape == chosen.weights.shape == (3 * TOKENS, K)
