"""Blocks that start as random tokens: what a step keeps, and when a block ends."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from coterie.decoding import DecodeRequest, Sampling, SequenceState, parse_kv_scheme, parse_unmask
from coterie.decoding.sampling import Proposal, propose
from coterie.decoding.unmask import BlockState, RenoiseRule
from coterie.values import NO_MASK

VOCABULARY, WIDTH = 20, 6
ENTROPIES = st.lists(st.floats(0, 8, width=32), min_size=1, max_size=12)


def kept(entropies: list[float], bound: float) -> Tensor:
    """Which positions of a block with these entropies a step keeps."""
    width = len(entropies)
    ids, ones = torch.zeros(width, dtype=torch.int64), torch.ones(width)
    proposal = Proposal(ids, ones, ids, ones, torch.tensor(entropies))
    masked = ones.bool()
    return RenoiseRule(bound=bound).choose(
        BlockState(proposal, ids, masked, ~masked, NO_MASK, 0, width)
    )


def sequence(unmask: str = "renoise:steps=5", **options: object) -> SequenceState:
    values = {
        "prompt_ids": (3, 4),
        "max_new_tokens": 2 * WIDTH,
        "block_length": WIDTH,
        "kv_scheme": parse_kv_scheme("encoder"),
        "unmask": parse_unmask(unmask),
        "sampling": Sampling(),
        "seed": 1,
        "early_stop": "block",
        "eos_ids": (19,),
        "mask_id": NO_MASK,
        "vocabulary": VOCABULARY,
    }
    return SequenceState(DecodeRequest(**(values | options)))  # type: ignore[arg-type]


def logits_of(ids: list[int], certainty: float = 0.0) -> Tensor:
    """Logits whose best token is ``ids``; with much certainty it is nearly always drawn."""
    logits = torch.zeros(len(ids), VOCABULARY)
    logits[torch.arange(len(ids)), ids] = 0.1 + certainty
    return logits


def inputs(state: SequenceState) -> list[int]:
    assert state.next_pass is not None
    return state.input_tokens(state.next_pass).tolist()


@given(ENTROPIES, st.floats(0, 20))
def test_a_step_keeps_the_lowest_entropies_and_at_least_one(
    entropies: list[float], bound: float
) -> None:
    mask = kept(entropies, bound)
    assert mask.any()
    inside = [e for e, is_kept in zip(entropies, mask.tolist(), strict=True) if is_kept]
    outside = [e for e, is_kept in zip(entropies, mask.tolist(), strict=True) if not is_kept]
    assert not outside or max(inside) <= min(outside)
    assert sum(sorted(inside)[:-1]) <= bound + 1e-4


@given(ENTROPIES, st.floats(0, 20), st.floats(0, 20))
def test_a_greater_bound_keeps_no_less(entropies: list[float], one: float, other: float) -> None:
    small, large = kept(entropies, min(one, other)), kept(entropies, max(one, other))
    assert not (small & ~large).any()


@given(st.integers(1, 60), st.floats(0.1, 2), st.floats(0.1, 2))
def test_the_temperature_moves_evenly_and_never_reaches_its_end(
    steps: int, hot: float, cold: float
) -> None:
    rule = RenoiseRule(steps=steps, hot=hot, cold=cold)
    temperatures = [rule.temperature(step) for step in range(steps)]
    assert abs(temperatures[0] - hot) < 1e-9
    pairs = zip(temperatures, [*temperatures[1:], cold], strict=True)
    assert all(abs((a - b) - (hot - cold) / steps) < 1e-9 for a, b in pairs)


@given(st.integers(1, 6), st.integers(0, 999))
def test_an_uncertain_block_takes_all_steps_and_then_its_most_probable_tokens(
    steps: int, seed: int
) -> None:
    state = sequence(f"renoise:steps={steps}", seed=seed)
    state.receive(None)
    best = [[(step + i) % 18 for i in range(WIDTH)] for step in range(steps)]
    for step, ids in enumerate(best):
        assert all(0 <= token < VOCABULARY for token in inputs(state))
        assert state.answer == []
        committed = [token.id for token in state.receive(logits_of(ids)).committed]
        assert committed == (ids if step == steps - 1 else [])
    assert state.answer == best[-1]
    assert state.next_pass is not None
    assert (state.next_pass.kind, state.next_pass.causal_block) == ("commit", 1)


def test_certain_tokens_stay_and_the_others_become_noise() -> None:
    state = sequence("renoise:steps=5,bound=0.01")
    state.receive(None)
    logits = logits_of([7] * WIDTH)
    logits[2, 11] = 90.0
    seen = set()
    for _ in range(4):
        state.receive(logits)
        assert inputs(state)[2] == 11
        seen.add(tuple(inputs(state)))
    assert len(seen) == 4


@given(st.integers(0, 3))
def test_a_certain_block_ends_when_its_tokens_stand_still(stable: int) -> None:
    state = sequence(f"renoise:steps=9,stable={stable}")
    state.receive(None)
    steps = 0
    while not state.answer:
        state.receive(logits_of([5] * WIDTH, certainty=90.0))
        steps += 1
    assert steps == stable + 1


def test_a_seed_decides_the_noise() -> None:
    def first_inputs(seed: int) -> list[int]:
        state = sequence(seed=seed)
        state.receive(None)
        return inputs(state)

    assert first_inputs(1) == first_inputs(1) != first_inputs(2)


def test_an_end_of_text_ends_the_answer_after_its_block() -> None:
    state = sequence("renoise:steps=1")
    state.receive(None)
    state.receive(logits_of([5, 19, 5, 5, 5, 5]))
    assert state.next_pass is None
    assert (state.answer, state.ended_by_eos) == ([5], True)


def test_a_temperature_of_the_request_replaces_the_schedule() -> None:
    assert sequence().temperature == 0.8
    assert sequence(sampling=Sampling(0.3)).temperature == 0.3


@given(st.integers(2, 30), st.integers(0, 999))
def test_unsorted_draws_follow_the_probabilities(vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, vocabulary, generator=generator).mul(2).expand(4000, -1)
    sampling = Sampling(temperature=0.7)
    drawn = propose(logits, sampling, NO_MASK, generator, sort=False)
    share = torch.bincount(drawn.ids, minlength=vocabulary) / len(logits)
    probabilities = torch.softmax(logits[0] / 0.7, dim=-1)
    assert float((share - probabilities).abs().max()) < 0.05
    torch.testing.assert_close(drawn.confidence, probabilities[drawn.ids])
