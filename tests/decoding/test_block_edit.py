"""Rules that edit a block: golden traces, DELETE and SPLIT, and laws on random logits."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared_data import golden
from torch import Tensor

from coterie.decoding.block_edit import (
    BlockEditRule,
    EditIds,
    EditState,
    JointEditRule,
    JointThresholdInDelRule,
    Predictions,
)
from coterie.decoding.sampling import Sampling, propose

IDS = EditIds(mask=9, delete=8, split=7)
RULES = st.sampled_from(
    (JointEditRule(limit=60), JointEditRule(0.9, 0.5, 2, 4, 60), JointEditRule(post=0, limit=60))
) | st.sampled_from((JointThresholdInDelRule(), JointThresholdInDelRule(0.9, 0.5, 0)))


@st.composite
def starts(draw: st.DrawFn) -> EditState:
    width = draw(st.integers(1, 9))
    prompt = draw(st.integers(0, width - 1))
    return EditState.start([*range(prompt), *[IDS.mask] * (width - prompt)], prompt, IDS)


@given(starts(), RULES, st.integers(0, 2**32 - 1))
def test_a_block_ends_full_of_text_behind_its_prompt(
    state: EditState, rule: BlockEditRule, seed: int
) -> None:
    after = state
    for after in run(state, rule, seed):
        assert len(after.tokens) == len(state.tokens)
        assert after.tokens[: state.prompt] == state.tokens[: state.prompt]
        assert not {IDS.delete, IDS.split} & set(after.tokens)
        assert after.step <= 62
    assert IDS.mask not in after.tokens


@given(starts(), RULES, st.integers(0, 2**32 - 1))
def test_sources_tell_where_each_token_was(
    state: EditState, rule: BlockEditRule, seed: int
) -> None:
    before = state
    for after in run(state, rule, seed):
        kept = [source for source in after.sources if source >= 0]
        assert kept == sorted(set(kept))
        inserted = [i for i, source in enumerate(after.sources) if source < 0]
        assert all(after.tokens[i] == IDS.mask and not after.original[i] for i in inserted)
        assert all(
            after.original[i] == before.original[source]
            for i, source in enumerate(after.sources)
            if source >= 0
        )
        before = after


@given(starts(), RULES, st.integers(0, 2**32 - 1))
def test_the_same_logits_and_seed_give_the_same_block(
    state: EditState, rule: BlockEditRule, seed: int
) -> None:
    assert list(run(state, rule, seed)) == list(run(state, rule, seed))


def test_edits_of_the_reference() -> None:
    document = json.loads((golden("llada22") / "edits.json").read_text())
    ids = EditIds(document["mask"], document["delete"], document["split"])
    for case in document["cases"]:
        flags = tuple(map(bool, case["old_is_original_mask"]))
        before = EditState(ids, tuple(case["old"]), case["prompt"], flags, (), 0)
        after = before.edited(case["written"])
        assert list(after.tokens) == case["tokens"]
        assert list(map(int, after.original)) == case["is_original_mask"]


@pytest.mark.parametrize("key", ["reference_rule", "sglang_0_5_23"])
def test_traces_of_the_reference(key: str) -> None:
    lines = (golden("llada22") / "edit-traces.jsonl").read_text().splitlines()
    for trace in map(json.loads, lines):
        options = trace["threshold"], trace["edit_threshold"], trace["max_post_steps"]
        rule = (
            JointEditRule(*options)
            if key == "reference_rule"
            else JointThresholdInDelRule(*options)
        )
        ids = EditIds(trace["mask"], trace["delete"], trace["split"])
        masks = [ids.mask] * (trace["block"] - len(trace["prompt"]))
        state = EditState.start([*trace["prompt"], *masks], len(trace["prompt"]), ids)
        for row, logits in zip(trace[key], trace["logits"], strict=False):
            assert list(state.tokens) == row["before"]
            if state.done:  # SGLang's last forward stores the keys of a finished block
                assert row == trace[key][-1]
                assert row["after"] == row["before"]
                break
            state = rule.advance(state, predictions(torch.tensor(logits)), torch.Generator())
            assert list(state.tokens) == row["after"]
            assert list(map(int, state.original)) == row["orig_after"]
        drawn = trace["reference_end"] == "would draw" and key == "reference_rule"
        assert drawn or state.done


def test_a_repeated_input_gets_a_token_that_was_never_written() -> None:
    """The least certain change of a returning block takes the best token that is new there."""
    rule, state = JointThresholdInDelRule(), EditState.start([0, 9, 9, 9], 1, IDS)
    logits = torch.tensor([[5.0, *[0.0] * 9], _best(7, 3), _best(2, 1), _best(4, 5)])
    tokens = []
    for _ in range(3):
        state = rule.advance(state, predictions(logits), torch.Generator())
        tokens.append(state.tokens)
    assert tokens == [(0, 9, 9, 2), (0, 9, 9, 2), (0, 3, 2, 4)]


def run(state: EditState, rule: BlockEditRule, seed: int) -> Iterator[EditState]:
    """The states after each forward, with logits that depend on the block alone."""
    draws = torch.Generator().manual_seed(seed)
    while not state.done:
        row = torch.Generator().manual_seed(seed + hash(state.tokens) % 2**31)
        logits = 3 * torch.randn(len(state.tokens), 10, generator=row)
        state = rule.advance(state, predictions(logits), draws)
        yield state


def predictions(logits: Tensor) -> Predictions:
    return Predictions(logits, propose(logits, Sampling(), IDS.mask, torch.Generator()))


def _best(first: int, second: int) -> list[float]:
    return [4.0 if i == first else 2.0 if i == second else 0.0 for i in range(10)]
