"""Lists of budgets: one share for each layer that routes, or an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from score_strategies import blocks

from coterie import Engine, load
from coterie.errors import CoterieError
from coterie.routing import POLICIES, check_layers, format_policy, parse_policy
from coterie.specs import spec_options
from coterie.values import Scores

POLICIES_WITH_LISTS = tuple(
    name
    for name, cls in POLICIES.items()
    if any(o.accepts_list for o in spec_options(cls).values())
)


def test_every_policy_with_a_share_takes_a_list():
    shares = {name for name, cls in POLICIES.items() if "voters" in spec_options(cls)}
    assert set(POLICIES_WITH_LISTS) == {
        name for name in shares if "beta" in spec_options(POLICIES[name])
    }


@given(
    blocks(),
    st.sampled_from(POLICIES_WITH_LISTS),
    st.lists(st.sampled_from((0.1, 0.25, 0.5, 1.0)), min_size=2, max_size=5),
)
@law()
def test_a_layer_elects_by_its_own_share(scores: Scores, name: str, betas: list[float]):
    listed = parse_policy(f"{name}:beta={'/'.join(map(str, betas))}")
    for index, beta in enumerate(betas):
        layer_scores = replace(scores, moe_index=index)
        alone = parse_policy(f"{name}:beta={beta}").eligible(layer_scores, scores.router.k)
        assert torch.equal(listed.eligible(layer_scores, scores.router.k), alone)


def test_a_list_formats_as_it_was_written():
    text = "des-vote:beta=0.3/0.2/0.25/0.3,voters=before-eos"
    assert format_policy(parse_policy(text)) == text


def test_the_model_numbers_the_layers_that_route(engine: Engine):
    """The first layer of the embedded model is dense: budgets belong to layers 1 to 4."""
    result = engine.generate("Tom has 3 boxes.", policy="des-vote:beta=0.1/0.2/0.05/0.15")
    assert result.experts.per_layer == (12, 25, 6, 19)


@pytest.mark.parametrize("text", ["des-vote:beta=0.3/0.2", "coreset:beta=1/1/1/1/1"])
def test_a_list_of_another_length_is_an_error_on_submit(engine: Engine, text: str):
    count = text.count("/") + 1
    with pytest.raises(CoterieError, match=rf"{text}.* {count} shares.* 4 layers"):
        engine.submit("Tom has 3 boxes.", policy=text)
    assert engine.rows == ()


def test_policies_without_a_list_fit_any_number_of_layers():
    for text in ("vanilla", "des-seq:k=3", "des-vote:beta=0.3", "coreset:m=4"):
        check_layers(parse_policy(text), 7)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load(max_new_tokens=32)
