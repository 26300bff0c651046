"""Coresets limited to a number, or to the slots of their layer."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import cached_store, expert_blobs
from policy_strategies import coresets, law
from score_strategies import blocks
from test_replay import drawn, grid, imagined, play

from coterie.errors import CoterieError
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.policies import fidelity
from coterie.lab.replay.replay import replay
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.offload.tiers import HostTier
from coterie.routing import DesVote, Election, format_policy, parse_policy, route
from coterie.routing.router import coreset_of, route_by_mask, vanilla_ids, vanilla_votes
from coterie.values import Policy, RouterSpec, Scores


def test_a_store_reports_its_slots() -> None:
    assert ResidentExpertStore({}).capacity is None
    assert SimulatedCacheStore(ResidentExpertStore({}), CacheSimulator(8, 5)).capacity == 5
    assert cached_store(HostTier(expert_blobs(8)), 8, 3).capacity == 3


def with_election(policy: Policy, **changes: object) -> Policy:
    """The policy with other options of its election."""
    coreset_policy = cast("DesVote", policy)
    return replace(coreset_policy, election=replace(coreset_policy.election, **changes))


def elected(scores: Scores, policy: Policy) -> torch.Tensor:
    """[S, E]."""
    scores = replace(scores, vanilla_ids=vanilla_ids(scores))
    return coreset_of(scores, policy.eligible(scores, scores.router.k))


@given(blocks(), coresets(), st.integers(1, 40))
@law(80)
def test_no_coreset_exceeds_its_limit(scores: Scores, policy: Policy, limit: int) -> None:
    bounded = elected(scores, with_election(policy, max_experts=limit))
    assert int(bounded.sum(-1).max()) <= limit
    limited = replace(scores, slots=limit)
    assert torch.equal(elected(limited, with_election(policy, max_experts="slots")), bounded)
    free = elected(scores, with_election(policy, max_experts=None, resident_bonus=0.0)).sum(-1)
    expected = free.clamp(max=limit)
    assert torch.equal(
        elected(scores, with_election(policy, max_experts=limit, resident_bonus=0.0)).sum(-1),
        expected,
    )


@given(blocks(), coresets())
@law(40)
def test_slots_do_not_limit_if_all_experts_are_in_memory(scores: Scores, policy: Policy) -> None:
    unlimited = elected(scores, with_election(policy, max_experts=None))
    assert torch.equal(elected(scores, with_election(policy, max_experts="slots")), unlimited)
    assert torch.equal(
        elected(scores, with_election(policy, max_experts=scores.router.experts)), unlimited
    )


@given(blocks(), st.integers(1, 12))
@law(40)
def test_a_limited_union_has_the_experts_with_most_votes(scores: Scores, limit: int) -> None:
    votes = vanilla_votes(scores)
    for free, limited in (
        ("des-seq:k=2", f"des-seq:k=2,max={limit}"),
        ("des-seq:k=1", f"coreset:m=1,protect=top1,max={limit}"),
    ):
        union = elected(scores, parse_policy(free))
        coreset = elected(scores, parse_policy(limited))
        assert not (coreset & ~union).any()
        removed = union & ~coreset
        for row, count in enumerate(removed.sum(-1).tolist()):
            if count:
                assert votes[row][coreset[row]].min() >= votes[row][removed[row]].max()


@pytest.mark.parametrize(
    "text",
    ["des-vote:beta=0.5,max=2", "des-seq:k=3,max=2", "xshare:beta=0.5,max=2"],
)
def test_a_token_uses_as_many_experts_as_the_limit(text: str) -> None:
    logits = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3))
    scores = Scores(logits, RouterSpec(16, 4, "sigmoid", renormalise=True))
    for routing in (each(scores, parse_policy(text)) for each in (route, route_by_mask)):
        assert int(routing.used.sum()) == 2
        assert bool(((routing.topk_ids >= 0).sum(-1) == 2).all())


def test_the_max_option() -> None:
    for text in ("des-vote:beta=0.3,max=slots", "des-seq:k=3,max=12", "random:beta=0.1,max=2"):
        assert format_policy(parse_policy(text)) == text
    with pytest.raises(CoterieError, match="max must be a whole number or slots, not 'few'"):
        parse_policy("des-vote:beta=0.3,most=few")
    with pytest.raises(CoterieError, match="max must be at least 1, not 0"):
        Election(max_experts=0)
    with pytest.raises(CoterieError, match="unknown option 'most'"):
        parse_policy("topk:k=2,most=3")


@pytest.mark.parametrize("policy", ["uniform-vote:beta=0.8,max=slots", "des-seq:k=2,max=slots"])
def test_a_replay_of_a_limited_policy_predicts_a_run(policy: str) -> None:
    store, results, trace = imagined(policy, 4, commit="policy")
    assert max(result.experts.max for result in results) == 4
    point = replay(
        trace, grid(ReplayPolicy(parse_policy(policy), routes_commits=True), capacity="4")
    ).points[0]
    assert point.traffic.experts_used == pytest.approx(
        store.traffic_log.traffic().experts_used, rel=0.1
    )
    assert point.traffic.experts_moved == pytest.approx(
        store.traffic_log.traffic().experts_moved, rel=0.1
    )


def test_each_capacity_of_a_replay_has_its_own_coresets() -> None:
    limited = play("des-vote:beta=0.5,max=slots")
    result = replay(drawn(), grid(limited, caches="lru,belady", capacity="5,8,24"))
    experts = {(point.slots, point.case.eviction): point.experts for point in result.points}
    free = replay(drawn(), grid(play("des-vote:beta=0.5"), capacity="24")).points[0].experts
    assert {slots: experts[slots, "belady"] for slots in (5, 8, 24)} == {5: 5.0, 8: 8.0, 24: free}
    for slots in (5, 8, 24):
        assert experts[slots, "lru"] == experts[slots, "belady"]


def test_fidelity_of_limited_unions() -> None:
    assert fidelity(parse_policy("des-seq:k=2")) == "exact"
    assert fidelity(parse_policy("des-seq:k=2,most=3")) == "nearly"
    with pytest.raises(CoterieError, match="vote=full"):
        fidelity(parse_policy("coreset:k=2,vote=full,most=3"))
