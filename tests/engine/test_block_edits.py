"""Requests whose blocks are edited and routed as a whole (LLaDA2.2), on a tiny random model."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.engine.engine import Engine
from coterie.engine.events import Finished, Result
from coterie.errors import CoterieError, GenerationError
from coterie.loading.load import Model
from coterie.testing import random_transformer, read_spec, tiny_config
from coterie.tokenizer import IdTokenizer

RULES = ("joint-edit:limit=15", "joint-threshold-indel:post=3", "joint-edit:p=0.1,post=2,limit=15")
CAPACITY = 8


@cache
def tiny(family: str = "llada2.2", seed: int = 1) -> Model:
    kind, spec = read_spec(tiny_config(family))
    return Model(
        name=f"tiny {family}",
        family=kind,
        transformer=random_transformer(spec, seed=seed),
        tokenizer=IdTokenizer(spec.vocabulary),
        mask_id=95,
        eos_ids=(94,),
    )


@given(
    st.lists(st.integers(0, 91), min_size=1, max_size=40),
    st.integers(1, 40),
    st.sampled_from(RULES),
    st.integers(1, 3),
)
@law(8)
def test_the_events_replay_the_canvas_and_text_never_changes(
    prompt: list[int], count: int, rule: str, seed: int
) -> None:
    host = Engine(tiny(seed=seed))
    canvas: dict[int, int] = {}
    text, result = "", None
    for event in host.stream(prompt, max_new_tokens=count, unmask=rule, early_stop="off"):
        if isinstance(event, Finished):
            result = event.result
            break
        changed = (*event.committed, *event.edited)
        assert all(event.start <= token.position < event.stop for token in changed)
        for token in event.committed:
            assert token.position not in canvas
        for token in event.edited:
            assert canvas[token.position] != token.id
        canvas |= {token.position: token.id for token in changed}
        for position in event.remasked:
            del canvas[position]
        assert not {92, 93, 95} & set(canvas.values())
        text += event.text
    assert isinstance(result, Result)
    assert [canvas[position] for position in range(count)] == list(result.tokens)
    assert text == result.text
    assert result.experts.max <= CAPACITY


@given(st.lists(st.integers(0, 91), min_size=1, max_size=40), st.sampled_from(RULES))
@law(3)
def test_a_cache_changes_no_token(prompt: list[int], rule: str) -> None:
    options = {"max_new_tokens": 20, "unmask": rule, "early_stop": "off"}
    host = Engine(tiny())
    cached = host.generate(prompt, kv_cache="block-causal", **options)
    assert (
        host.generate(prompt, kv_cache="block-causal-uncached", **options).tokens == cached.tokens
    )
    all_experts = host.generate(prompt, policy="des-vote:beta=1", **options)
    assert (all_experts.tokens, all_experts.forwards) == (cached.tokens, cached.forwards)


def test_requests_in_a_batch_decode_as_they_do_alone() -> None:
    prompts = [[5, 17, 33], list(range(40)), [7] * 33]
    options = {"max_new_tokens": 24, "unmask": RULES[0], "early_stop": "off"}
    alone = [Engine(tiny()).generate(prompt, **options) for prompt in prompts]
    together = Engine(tiny()).generate(prompts, **options)
    assert [r.tokens for r in together] == [r.tokens for r in alone]


@pytest.mark.parametrize(("length", "start"), [(1, 0), (31, 0), (32, 32), (45, 32), (64, 64)])
def test_the_last_unfinished_block_of_a_prompt_is_not_prefilled(length: int, start: int) -> None:
    host = Engine(tiny())
    sequence = host.sequence(host.submit([3] * length, max_new_tokens=8))
    if start:
        assert sequence.next_pass is not None
        assert (sequence.next_pass.kind, sequence.next_pass.stop) == ("prefill", start)
        host.step()
    for _ in range(3):
        assert sequence.next_pass is not None
        assert (sequence.next_pass.start, sequence.next_pass.stop) == (start, start + 32)
        host.step()
        assert sequence.canvas.tokens[:length].tolist() == [3] * length


@pytest.mark.parametrize("token", [92, 93, 95])
def test_a_prompt_with_a_special_token_is_refused(token: int) -> None:
    with pytest.raises(GenerationError, match=str(token)):
        Engine(tiny()).submit([1, token, 2])


def test_rules_that_edit_blocks_need_the_tokens_for_it() -> None:
    with pytest.raises(CoterieError, match="DELETE"):
        Engine(tiny("llada2")).submit([1, 2], unmask="joint-edit")
    with pytest.raises(CoterieError, match="addition"):
        Engine(tiny()).submit([1, 2], unmask="joint-edit+edit:p=0.5")


def test_the_defaults_of_the_checkpoint_edit_blocks() -> None:
    assert Engine(tiny()).generation.unmask == "joint-edit"
    assert Engine(tiny("llada2")).generation.unmask == "threshold:p=0.9"
