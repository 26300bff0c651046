"""What holds for a model of each family: its own routing under full coresets, and batching."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import family_generation, tiny_model

from coterie.engine.engine import Engine
from coterie.engine.events import Finished
from coterie.telemetry import Recorder, TensorRecorder
from coterie.testing import FAMILY_CONFIGS

FULL = ("des-vote:beta=1", "des-vote:beta=1,protect=top1", "xshare:beta=1", "des-seq:k=4")
PROMPTS = st.lists(st.integers(0, 91), min_size=1, max_size=40)


def engine(family: str, recorder: Recorder | None = None) -> Engine:
    generation = family_generation(family).replace(max_new_tokens=10)
    return Engine(tiny_model(family), generation=generation, recorder=recorder)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@given(prompt=PROMPTS, policy=st.sampled_from(FULL))
@settings(max_examples=3)
def test_a_coreset_of_all_experts_is_the_models_own_routing(
    family: str, prompt: list[int], policy: str
) -> None:
    """To the last bit: every layer gets the same input in every forward."""
    plain, full = TensorRecorder(), TensorRecorder()
    own = engine(family, plain).generate(prompt)
    other = engine(family, full).generate(prompt, policy=policy)
    assert (own.tokens, own.forwards) == (other.tokens, other.forwards)
    assert len(plain.inputs) == len(full.inputs) > 0
    for (layer, x), (other_layer, other_x) in zip(plain.inputs, full.inputs, strict=True):
        assert layer == other_layer
        assert torch.equal(x, other_x)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@given(prompts=st.lists(PROMPTS, min_size=2, max_size=3), seed=st.integers(0, 9))
@settings(max_examples=2)
def test_rows_of_a_batch_decode_as_they_do_alone(
    family: str, prompts: list[list[int]], seed: int
) -> None:
    together = engine(family)
    numbers = [together.submit(prompt, seed=seed + i) for i, prompt in enumerate(prompts)]
    ends = {}
    while together.rows:
        ends |= {e.row: e.result for e in together.step() if isinstance(e, Finished)}
    for i, (number, prompt) in enumerate(zip(numbers, prompts, strict=True)):
        alone = engine(family).generate(prompt, seed=seed + i)
        assert (ends[number].tokens, ends[number].forwards) == (alone.tokens, alone.forwards)
