"""A watcher sees what a gate read and chose, in decoding forwards only, and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law, spellings
from tiny_models import family_generation, tiny_model
from torch.nn import functional as F

from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.engine.generation_config import GenerationConfig
from coterie.engine.observation import (
    LayerObservation,
    collect_observations,
    moe_output,
    observe_forwards,
)
from coterie.errors import CoterieError
from coterie.model.moe import MoE
from coterie.ops import reference
from coterie.routing import parse_policy, route
from coterie.telemetry import ExpertCounter, Recorder, RecorderGroup, TensorRecorder
from coterie.testing import FAMILY_CONFIGS
from coterie.values import NO_MASK, ExpertRequest

PROMPTS = [[5, 17, 33, 2, 9], [7, 7, 1], [40, 41, 42, 43, 44, 45, 46], [3, 60, 8, 11]]
FAMILIES = tuple(FAMILY_CONFIGS)


def engine(family: str = "llada2", **options: object) -> Engine:
    usual = {"block": 8, "max_new_tokens": 12} | options
    generation = GenerationConfig()
    if tiny_model(family).mask_id == NO_MASK:
        generation = family_generation(family)
    return Engine(tiny_model(family), generation=generation.replace(**usual))


def layer(seen: LayerObservation, family: str = "llada2") -> MoE:
    found = tiny_model(family).transformer.layers[seen.layer].feed_forward
    assert isinstance(found, MoE)
    return found


def untimed(results: list[Result]) -> list[Result]:
    return [replace(result, seconds=0.0) for result in results]


@pytest.mark.parametrize("family", FAMILIES)
def test_observed_input_is_the_gate_input(family: str) -> None:
    for seen in collect_observations(engine(family), PROMPTS):
        moe = layer(seen, family)
        if moe.norms is None:  # else the router has an input of its own
            logits = F.linear(seen.x.float(), moe.gate)
            assert torch.equal(logits, seen.scores.logits)
        assert torch.equal(
            route(seen.scores, parse_policy("vanilla")).topk_ids, seen.routing.topk_ids
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_moe_output_equals_the_layer_output(family: str) -> None:
    host = engine(family)
    slow = TensorRecorder()
    eye = Engine(host.model, generation=host.generation, recorder=slow)
    eye.generate(PROMPTS[0])
    for seen in collect_observations(host, PROMPTS[:1]):
        whole = moe_output(host.model, seen, seen.routing)
        at = [i for i, (number, _) in enumerate(slow.inputs) if number == seen.layer]
        assert any(torch.equal(slow.inputs[i][1], seen.x) for i in at)
        flat = seen.x.flatten(0, 1)
        by_hand = torch.stack(
            [_alone(layer(seen, family), seen, flat, t) for t in range(len(flat))]
        )
        torch.testing.assert_close(whole.flatten(0, 1), by_hand, atol=1e-5, rtol=1e-4)


def _alone(moe: MoE, seen: LayerObservation, flat: torch.Tensor, token: int) -> torch.Tensor:
    """One token through its experts one by one, and the shared one."""
    (slab,) = moe.store.serve(moe.layer, ExpertRequest(seen.routing.used))
    out = torch.zeros_like(flat[token])
    ids, weights = seen.routing.topk_ids[token].tolist(), seen.routing.topk_weights[token].tolist()
    for expert, weight in zip(ids, weights, strict=True):
        slot = int(slab.slot_of[expert])
        gate_up = F.linear(flat[token], slab.gate_up[slot])
        activated = reference.activate_and_mul(gate_up, moe.spec.activation)
        out += weight * F.linear(activated, slab.down[slot])
    return out if moe.shared is None else out + moe.shared.apply(flat[token])


@law(5)
@given(spelling=spellings(), family=st.sampled_from(FAMILIES))
def test_observation_does_not_change_results(spelling: str, family: str) -> None:
    host = engine(family, max_new_tokens=9)
    plain = [host.generate(prompt, policy=spelling) for prompt in PROMPTS[:2]]
    watched = observe_forwards(host, PROMPTS[:2], lambda _: None, policy=spelling, batch_size=1)
    assert untimed(watched) == untimed(plain)


@law(5)
@given(spelling=spellings(), rows=st.integers(1, 5))
def test_observed_experts_equal_the_engines_counts(spelling: str, rows: int) -> None:
    counting = ExpertCounter()

    def count(seen: LayerObservation) -> None:
        counting.on_forward(seen.rows)
        counting.on_routed(seen.layer, seen.scores, seen.routing)

    results = observe_forwards(
        engine(max_new_tokens=9), PROMPTS, count, policy=spelling, batch_size=rows
    )
    for row, result in enumerate(results):
        counts = counting.counts(row)
        assert counts.forwards == result.experts.forwards == result.forwards
        assert (counts.per_layer, counts.max) == (result.experts.per_layer, result.experts.max)
        assert counts.vote_mass_kept == result.vote_mass_kept


def test_batch_size_does_not_change_results() -> None:
    many, few = (
        observe_forwards(engine(), PROMPTS, lambda _: None, batch_size=rows) for rows in (4, 2)
    )
    assert [len(results) for results in (many, few)] == [4, 4]
    assert [r.prompt_tokens for r in few] == [len(prompt) for prompt in PROMPTS]
    assert [r.tokens for r in few] == [r.tokens for r in many]


def test_only_decode_forwards_are_observed() -> None:
    """Not the prompt's, and not the passes that write a block's keys."""
    seen: list[LayerObservation] = []
    (result,) = observe_forwards(engine(), [[*range(3, 20)]], seen.append)
    assert result.prefills > 0
    assert result.commits > 0
    assert len(seen) == result.forwards * len(tiny_model("llada2").spec.moe_layers)
    assert {look.x.shape[1] for look in seen} == {8}


def test_a_window_starts_where_its_block_does() -> None:
    (result,) = observe_forwards(engine(), PROMPTS[:1], seen_starts := _Starts())
    whole = sorted(set(seen_starts.found))
    assert whole[0] <= 0 < whole[0] + 8  # the first block may begin inside the prompt
    assert [b - a for a, b in pairwise(whole)] == [8] * (result.blocks - 1)


class _Starts:
    def __init__(self) -> None:
        self.found: list[int] = []

    def __call__(self, seen: LayerObservation) -> None:
        self.found += seen.starts


def test_layers_and_forwards_can_be_limited() -> None:
    host = engine()
    seen = collect_observations(host, PROMPTS, layers=[2], max_forwards=1)
    assert {look.layer for look in seen} == {2}
    assert sorted(row for look in seen for row in look.rows) == [0, 1, 2, 3]
    assert all(look.scores.forward_indices == (0,) * len(look.rows) for look in seen)


def test_observation_does_not_touch_the_engines_requests() -> None:
    host = engine()
    number = host.submit(PROMPTS[0])
    before = host.sequence(number).next_pass
    collect_observations(host, PROMPTS[1:])
    assert host.rows == (number,)
    assert host.sequence(number).next_pass is before


def test_layer_without_experts_raises() -> None:
    with pytest.raises(CoterieError, match="layers 0, 9 have no experts"):
        collect_observations(engine(), PROMPTS, layers=[0, 1, 9])
    (seen, *_) = collect_observations(engine(), PROMPTS[:1])
    with pytest.raises(CoterieError, match="layer 0 has no experts"):
        moe_output(tiny_model("llada2"), replace(seen, layer=0), seen.routing)


def test_recorder_group_calls_each_recorder() -> None:
    first, second = TensorRecorder(), TensorRecorder()
    both: Recorder = RecorderGroup((first, Recorder(), second))
    (seen, *_) = collect_observations(engine(), PROMPTS[:1])
    both.on_forward((0,))
    both.on_moe_input(seen.layer, seen.x)
    both.on_routed(seen.layer, seen.scores, seen.routing)
    both.on_layer_output(seen.layer, seen.x)
    for trace in (first, second):
        assert trace.rows == [(0,)]
        assert trace.inputs == trace.outputs == [(seen.layer, seen.x)]
        assert trace.routings == [(seen.layer, seen.scores, seen.routing)]
