"""Counted experts: the assumed number is met, and a cache loads no more than is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.errors import ConfigError
from coterie.keys import to_json
from coterie.lab.bench.shapes import SHAPES
from coterie.lab.planner.expert_counts import PUBLISHED_LAW, RoutingSample, assumed_sample
from coterie.lab.replay.cache_simulation import ReplayPolicy
from coterie.lab.replay.trace_file import read_trace
from coterie.routing import parse_policy
from coterie.values import RouterSpec

ROUTER = RouterSpec(64, 4, "softmax", renormalise=True)
KEPT = Path(__file__).parents[2] / "kept"
RECORD = Path(__file__).parents[3] / "results" / "replay-drawn-mini.json"
policies = st.sampled_from(["vanilla", "des-vote:beta=0.25", "topk:k=2", "resident-vote:beta=0.2"])


def sample(unique: float, tokens: int = 16) -> RoutingSample:
    return assumed_sample(ROUTER, unique, tokens=tokens, steps=3, source="test")


def policy(text: str, *, routes_commits: bool = False) -> ReplayPolicy:
    return ReplayPolicy(parse_policy(text), routes_commits=routes_commits)


@given(st.integers(12, 50))
@law(10)
def test_a_sample_uses_about_as_many_experts_as_assumed(unique: int) -> None:
    counts = sample(unique, tokens=32).counter()(policy("vanilla"), 64)
    assert counts.decode.mean_used == pytest.approx(unique, rel=0.2)
    assert counts.decode.pairs == 32 * 4


@given(policies, st.integers(1, 64))
@law(20)
def test_loads_are_part_of_what_is_used(text: str, slots: int) -> None:
    counts = sample(30).counter()(policy(text), slots)
    for each in (counts.decode, counts.commit):
        assert (each.loads <= each.used).all()
        assert slots < 64 or not each.loads.any()


def test_even_routing_is_the_upper_bound() -> None:
    even, skewed = (sample(unique).counter()(policy("vanilla"), 64) for unique in (64, 20))
    expected = 64 * (1 - (1 - 4 / 64) ** 16)
    assert even.decode.mean_used == pytest.approx(expected, rel=0.05)
    assert skewed.decode.mean_used < even.decode.mean_used


def test_commits_use_the_policy_only_where_it_routes_them() -> None:
    count = sample(30).counter()
    ours, theirs = (count(policy("des-vote:beta=0.1", routes_commits=x), 64) for x in (True, False))
    assert ours.commit.mean_used == 6 < theirs.commit.mean_used
    assert ours.decode.mean_used == theirs.decode.mean_used == 6


def test_the_law_is_that_of_its_record() -> None:
    facts = json.loads(RECORD.read_text(encoding="utf-8"))["facts"]
    assert facts["as read off"]["law"] == to_json(PUBLISHED_LAW)
    router = SHAPES["llada2-mini"].spec.router
    assumed = assumed_sample(router, 84, tokens=32, steps=3, source="published")
    assert "of 256 experts" in assumed.assumption


def test_a_recorded_trace_is_counted() -> None:
    trace = read_trace(KEPT / "words.trace")
    counts = RoutingSample(trace, "").counter()(policy("vanilla"), trace.header.experts)
    assert 0 < counts.decode.mean_used <= trace.header.experts


@pytest.mark.parametrize("experts", [3, 65])
def test_a_number_that_no_block_uses_is_refused(experts: int) -> None:
    with pytest.raises(ConfigError, match="`unique_experts` is"):
        sample(experts)
