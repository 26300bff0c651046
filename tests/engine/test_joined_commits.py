"""Commits that ride with the next block's first forward: the same tokens in fewer forwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from test_engine import engine, finish, prompt_ids

from coterie.engine.events import Result
from coterie.engine.observation import observe_forwards
from coterie.errors import ConfigError
from coterie.routing import parse_policy, route
from coterie.testing import read_spec, tiny_config
from coterie.values import Scores, join_routings

JOINED, SEPARATE = "block-causal:commit=joined", "block-causal"
POLICIES = [
    *("vanilla", "des-vote:beta=0.5", "des-seq:k=2", "topk:k=2", "priced-vote:price=0.05"),
    *("random:beta=0.4", "des-vote:beta=0.4,voters=masked"),
]
options = st.fixed_dictionaries(
    {
        "policy": st.sampled_from(POLICIES),
        "max_new_tokens": st.integers(1, 24),
        "block": st.sampled_from([4, 8]),
        "commit_routing": st.sampled_from(["vanilla", "policy"]),
        "unmask": st.sampled_from(
            ["threshold:p=0.2", "fixed:steps=3", "threshold:p=0.3+smooth",
             "dynamic:p=0.3+edit:p=0.4,post=2", "threshold:p=0.3+credit"]
        ),
        "temperature": st.sampled_from([0.0, 0.8]),
        "seed": st.integers(0, 9),
        "early_stop": st.sampled_from(["off", "block", "token"]),
    }
)  # fmt: skip
families = st.sampled_from(["llada2", "sdar-moe", "llada2.2"])


def check(joined: Result, separate: Result) -> None:
    assert joined.tokens == separate.tokens
    assert joined.forwards == separate.forwards
    assert (joined.commits, separate.commits) == (0, separate.blocks - 1)


@law(12)
@given(families, st.lists(st.integers(0, 91), min_size=1, max_size=20), options)
def test_tokens_equal_those_of_separate_commits(
    family: str, prompt: list[int], wanted: dict
) -> None:
    joined = engine(family, kv_cache=JOINED).generate(prompt, **wanted)
    check(joined, engine(family, kv_cache=SEPARATE).generate(prompt, **wanted))


@law(3)
@given(st.lists(st.tuples(prompt_ids, options), min_size=2, max_size=4))
def test_rows_of_a_batch_equal_those_alone(rows: list[tuple[list[int], dict]]) -> None:
    host = engine(kv_cache=JOINED)
    numbers = [host.submit(prompt, **wanted) for prompt, wanted in rows]
    for (prompt, wanted), result in zip(rows, finish(host, numbers), strict=True):
        check(result, engine(kv_cache=SEPARATE).generate(prompt, **wanted))


@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_coresets_are_reused_as_with_separate_commits(tolerance: float) -> None:
    wanted = {"policy": "des-vote:beta=0.5", "reuse_tolerance": tolerance, "max_new_tokens": 24}
    joined, separate = (
        engine(kv_cache=plan).generate([5] * 11, unmask="fixed:steps=4", **wanted)
        for plan in (JOINED, SEPARATE)
    )
    check(joined, separate)
    assert joined.coreset_reuse_rate == separate.coreset_reuse_rate


def test_the_attention_of_a_policy_must_be_its_own() -> None:
    host, separate = engine(kv_cache=JOINED), engine(kv_cache=SEPARATE)
    wanted = {"prompt": [5] * 11, "policy": "mc-moe:beta=0.5,protect=0.2", "max_new_tokens": 24}
    check(host.generate(**wanted), separate.generate(**wanted))
    with pytest.raises(ConfigError, match="commit=separate"):
        host.generate(**wanted, commit_routing="policy")


def test_observed_commits_are_separate() -> None:
    widths: list[int] = []
    [result] = observe_forwards(
        engine(kv_cache=JOINED), [[5] * 8], lambda layer: widths.append(layer.x.shape[1])
    )
    assert set(widths) == {8}
    assert result.commits == result.blocks - 1 > 0


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_joined_routings_are_those_of_the_parts(
    seed: int, first: int, rest: int, rows: int
) -> None:
    _, spec = read_spec(tiny_config("llada2"))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, first + rest, spec.router.experts, generator=generator)
    scores = Scores(logits, spec.router, voters=torch.ones(rows, first + rest))
    policy = parse_policy("des-vote:beta=0.5")
    parts = [scores.positions(0, first), scores.positions(first)]
    assert [part.logits.shape[1] for part in parts] == [first, rest]
    routings = [route(part, policy) for part in parts]
    joined = join_routings(rows, *routings)
    ids = joined.topk_ids.view(rows, first + rest, -1)
    for routing, found in zip(routings, (ids[:, :first], ids[:, first:]), strict=True):
        assert torch.equal(routing.topk_ids.view_as(found), found)
    assert torch.equal(joined.used, routings[0].used | routings[1].used)
