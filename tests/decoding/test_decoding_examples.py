"""Every unmasking rule, kv_scheme and refinement on small examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from coterie.decoding import DecodeRequest, Sampling, SequenceState, parse_kv_scheme, parse_unmask
from coterie.decoding.canvas import Block
from coterie.decoding.kv_schemes import StepCounter
from coterie.decoding.refinements import Credit, Smooth
from coterie.decoding.sampling import Proposal, propose
from coterie.decoding.unmask import BlockState
from coterie.errors import NonFiniteLogitsError, SpecError

MASK = 3


def block_state(
    confidence: list[float],
    *,
    masked: str = "",
    ids: list[int] | None = None,
    entropy: list[float] | None = None,
    step: int = 0,
    floor: float = -math.inf,
) -> BlockState:
    """``masked``: one letter for each position, "m" = masked; default: all positions."""
    width = len(confidence)
    is_masked = torch.tensor([letter == "m" for letter in masked or "m" * width])
    proposed_ids = torch.tensor(ids or [1] * width)
    return BlockState(
        Proposal(
            proposed_ids,
            torch.tensor(confidence),
            proposed_ids,
            torch.tensor(confidence),
            entropy=None if entropy is None else torch.tensor(entropy),
        ),
        tokens=torch.where(is_masked, MASK, 0),
        masked=is_masked,
        generated=~is_masked,
        mask_id=MASK,
        step=step,
        initial_masked=int(is_masked.sum()),
        threshold_floor=floor,
    )


def positions(rule: str, state: BlockState) -> list[int]:
    return parse_unmask(rule).rule.choose(state).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("rule", "confidence", "expected"),
    [
        ("threshold:p=0.9", [0.95, 0.2, 0.9, 0.5], [0, 2]),
        ("threshold:p=0.9", [0.3, 0.2, 0.5, 0.4], [2]),
        ("threshold:p=0.9,slack=0", [0.5, 0.499995, 0.1, 0.1], [0]),
        ("threshold:p=0.9", [0.5, 0.499995, 0.1, 0.1], [0, 1]),
        ("dynamic:p=0.9,least=1", [0.91, 0.9, 0.95, 0.1], [0, 2]),
        ("dynamic:p=0.9,least=3", [0.91, 0.3, 0.95, 0.1], [0, 1, 2]),
        ("dynamic:p=0.9,steps=2", [0.1, 0.3, 0.2, 0.4], [1, 3]),
        ("fixed:steps=2", [0.1, 0.3, 0.2, 0.4], [1, 3]),
        ("static:steps=4", [0.1, 0.4, 0.4, 0.3], [1]),
        ("sequential:steps=2", [0.1, 0.3, 0.2, 0.4], [0, 1]),
    ],
)
def test_rules_choose_as_published(rule: str, confidence: list[float], expected: list[int]) -> None:
    assert positions(rule, block_state(confidence)) == expected


def test_a_position_that_proposes_the_mask_is_skipped() -> None:
    state = block_state([0.99, 0.5, 0.2], ids=[MASK, 1, 2])
    assert positions("threshold:p=0.9", state) == [1]


def test_smoothing_raises_thresholds() -> None:
    confidence = [0.95, 0.92, 0.1]
    assert positions("threshold:p=0.9", block_state(confidence, floor=0.94)) == [0]
    assert positions("hierarchy:p=0.9,low=0.93", block_state(confidence, floor=0.94)) == [0]


def test_hierarchy_takes_the_peak_of_every_run() -> None:
    state = block_state([0.3, 0.5, 0.9, 0.45, 0.4, 0.2, 0.1], masked="mm.mm.m")
    assert positions("hierarchy:p=0.8,low=0.4", state) == [1, 3]
    assert positions("hierarchy:p=0.8,low=0.95", state) == [1]


def test_entropy_takes_the_least_uncertain_under_the_bound() -> None:
    state = block_state([0.5] * 4, entropy=[0.3, 0.05, 0.2, 0.1])
    assert positions("entropy:bound=0.36", state) == [1, 2, 3]
    assert positions("entropy:bound=0.01", state) == [1]


def test_a_schedule_gives_its_first_steps_more() -> None:
    counts = [
        len(positions("static:steps=3", block_state([0.1] * 8, step=step))) for step in range(3)
    ]
    assert counts == [3, 3, 2]


def test_editing_replaces_confident_tokens_only() -> None:
    edit = parse_unmask("threshold+edit:p=0.5").edit
    assert edit is not None
    state = block_state([0.6, 0.4, 0.9, 0.7], masked="..m.", ids=[1, 1, 1, 0])
    assert edit.choose(state).nonzero()[:, 0].tolist() == [0]


def test_credit_adds_logits_to_earlier_proposals() -> None:
    credit = Credit(alpha=0.7, gamma=0.2, beta=0.8)
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    first, memory = credit.add_credit(logits, torch.tensor([True, False]), None)
    top = math.e / (1 + math.e)  # softmax of the first row's best
    assert memory[0, 0].item() == pytest.approx(top**0.2)
    assert memory[1].tolist() == [0, 0]
    assert first[0, 0].item() == pytest.approx(2 + 0.7 * math.log(1 + top**0.2), rel=1e-6)
    _, later = credit.add_credit(logits, torch.tensor([False, False]), memory)
    assert later[0, 0].item() == pytest.approx(0.8 * top**0.2)


def test_smoothing_grows_and_its_threshold_falls() -> None:
    smooth = Smooth(weight=0.3, init=0.15, growth=0.1, decay=0.25)
    assert [round(smooth.mix_weight(n), 3) for n in range(3)] == [0.15, 0.25, 0.3]
    assert [smooth.threshold_floor(n) for n in range(3)] == [1.0, 0.75, 0.5]
    mixed = smooth.mix_embeddings(
        torch.ones(2, 1), torch.full((2, 1), 10.0), torch.tensor([True, False]), forward=2
    )
    assert mixed.tolist() == [[4.0], [1.0]]


def test_dual_refreshes_then_computes_the_surroundings() -> None:
    kv_scheme = parse_kv_scheme("dual:before=4,after=6")
    block = Block(1, 16, 24)
    first, second = (kv_scheme.next_pass(block, 27, StepCounter(5 + n, n)) for n in range(2))
    assert (first.kind, first.start, first.stop, first.voters) == ("refresh", 0, 27, (16, 24))
    assert (second.kind, second.start, second.stop, second.visible) == ("decode", 12, 27, 27)
    assert second.voters == (12, 27)


def test_warm_up_is_uncached() -> None:
    kv_scheme = parse_kv_scheme("dual:warmup=2")
    passes = [kv_scheme.next_pass(Block(0, 0, 8), 16, StepCounter(n, n)) for n in range(4)]
    assert [each.use_cache for each in passes] == [False, False, True, True]
    assert [each.kind for each in passes] == ["decode", "decode", "refresh", "decode"]


def test_unroll_counts_a_round_with_a_refresh_twice() -> None:
    kv_scheme = parse_kv_scheme("dual+unroll:most=4,tokens=8")
    block = Block(0, 0, 32)
    assert kv_scheme.steps_until_check(block, 64, StepCounter(), num_masked=32) == 5
    assert kv_scheme.steps_until_check(block, 64, StepCounter(3, 3), num_masked=17) == 2
    assert kv_scheme.steps_until_check(block, 64, StepCounter(3, 3), num_masked=7) == 1


def test_block_causal_prefills_whole_blocks_and_commits() -> None:
    kv_scheme = parse_kv_scheme("block-causal")
    blocks = kv_scheme.blocks(21, 20, 8)
    assert [(b.start, b.stop) for b in blocks] == [(16, 24), (24, 32), (32, 40), (40, 48)]
    (prefill,) = kv_scheme.prefill_passes(blocks[0])
    assert (prefill.stop, prefill.causal_block, prefill.kind) == (16, 8, "prefill")
    (commit,) = kv_scheme.commit_passes(blocks[0])
    assert (commit.start, commit.visible, commit.kind) == (16, 24, "commit")
    assert kv_scheme.prefill_passes(Block(0, 0, 8)) == ()


def request(**changes: object) -> DecodeRequest:
    values: dict[str, object] = {
        "prompt_ids": (1, 2),
        "max_new_tokens": 6,
        "block_length": 3,
        "kv_scheme": parse_kv_scheme("uncached"),
        "unmask": parse_unmask("threshold:p=0.9"),
        "sampling": Sampling(),
        "seed": 0,
        "early_stop": "block",
        "eos_ids": (0,),
        "mask_id": MASK,
    }
    return DecodeRequest(**(values | changes))  # type: ignore[arg-type]


def confident_logits(ids: list[int]) -> Tensor:
    """Logits with nearly all probability on these ids."""
    return 30.0 * torch.nn.functional.one_hot(torch.tensor(ids), 4).float()


def test_a_sequence_stops_after_the_block_with_an_eos() -> None:
    sequence = SequenceState(request())
    sequence.receive(confident_logits([1, 0, 2]))
    assert sequence.next_pass is None
    assert (sequence.answer, sequence.ended_by_eos) == ([1], True)


def test_without_early_stop_a_sequence_continues() -> None:
    sequence = SequenceState(request(early_stop="off"))
    sequence.receive(confident_logits([1, 0, 2]))
    assert sequence.next_pass is not None
    sequence.receive(confident_logits([2, 2, 2]))
    assert (sequence.answer, sequence.ended_by_eos) == ([1, 0, 2, 2, 2, 2], False)


def test_a_token_stop_waits_for_earlier_masks() -> None:
    sequence = SequenceState(request(early_stop="token", unmask=parse_unmask("sequential:steps=3")))
    sequence.receive(confident_logits([1, 0, 2]))
    assert sequence.next_pass is not None
    sequence.receive(confident_logits([1, 0, 2]))
    assert sequence.next_pass is None
    assert sequence.stopped_early
    assert sequence.answer == [1]
    assert sequence.canvas.tokens.tolist() == [1, 2, 1, 0, MASK, MASK, MASK, MASK]


def test_editing_continues_until_nothing_changes() -> None:
    sequence = SequenceState(
        request(max_new_tokens=3, unmask=parse_unmask("threshold:p=0.9+edit:p=0.5,post=16"))
    )
    sequence.receive(confident_logits([1, 1, 1]))
    update = sequence.receive(confident_logits([1, 2, 1]))
    assert [(t.position, t.id) for t in update.edited] == [(1, 2)]
    sequence.receive(confident_logits([1, 2, 1]))
    assert sequence.next_pass is None
    assert sequence.steps.total == 3


def test_editing_ends_after_its_post_steps() -> None:
    sequence = SequenceState(
        request(max_new_tokens=3, unmask=parse_unmask("threshold:p=0.9+edit:p=0.5,post=2"))
    )
    for number in range(3):
        sequence.receive(confident_logits([1, 1 + number % 2, 1]))
    assert sequence.next_pass is None


def test_proposed_masks_do_not_stall_a_sequence() -> None:
    sequence = SequenceState(request(max_new_tokens=3, unmask=parse_unmask("fixed:steps=3")))
    for _ in range(3):
        sequence.receive(confident_logits([MASK, MASK, MASK]))
    assert sequence.next_pass is None
    assert MASK not in sequence.canvas.tokens.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_change_nothing(bad: float) -> None:
    sequence, reference = (
        SequenceState(request(sampling=Sampling(3.0))),
        SequenceState(request(sampling=Sampling(3.0))),
    )
    next_pass, before = sequence.next_pass, sequence.canvas.tokens.tolist()
    logits = confident_logits([1, 1, 1])
    logits[1, 2] = bad
    with pytest.raises(NonFiniteLogitsError):
        sequence.receive(logits)
    assert (sequence.next_pass, sequence.canvas.tokens.tolist(), sequence.steps) == (
        next_pass,
        before,
        StepCounter(),
    )
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert sequence.receive(logits) == reference.receive(logits)


def test_of_equal_logits_the_lower_id_wins() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert propose(logits, Sampling(), MASK, draw).ids.tolist() == [1]
    assert propose(logits, Sampling(1.0, top_k=1), MASK, draw).ids.tolist() == [1]


def test_draws_follow_the_probabilities() -> None:
    draw = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = propose(shares.log().expand(4000, 4), Sampling(1.0), 9, draw).ids
    frequency = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(frequency, shares, atol=0.02)


def test_temperature_sharpens() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    cold = propose(logits, Sampling(0.25), 9, draw)
    expected = 0.5**4 / (0.5**4 + 0.3**4 + 0.15**4 + 0.05**4)
    assert (cold.ids == 0).float().mean().item() == pytest.approx(expected, abs=0.02)
    assert cold.confidence[cold.ids == 0][0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("thresold:p=0.9", "unknown unmasking rule 'thresold'; known: .*threshold"),
        ("threshold:q=0.9", "unknown option 'q'; it has: p, slack"),
        ("threshold:p=1.5", "rule .threshold:p=1.5.: p must be above 0 and at most 1, not 1.5"),
        ("threshold:p=0.5,p=0.6", "p is given twice"),
        ("threshold:p=0.5,", "'' is not of the form option=value"),
        ("threshold:p=0", "p must be above 0"),
        ("threshold:p=nan", "p must be above 0 and at most 1, not nan"),
        ("threshold+credit:beta=nan", "beta must be finite, not nan"),
        ("fixed:steps=0", "steps must be at least 1, not 0"),
        ("fixed:steps=two", "steps must be a whole number, not 'two'"),
        ("threshold+edti", "unknown addition .*'edti'; known: credit, edit, smooth"),
        ("threshold+edit+edit", "edit is given twice"),
    ],
)
def test_an_invalid_unmasking_rule_is_an_error_with_the_valid_values(
    text: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        parse_unmask(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("duel", "unknown KV scheme 'duel'; known: block-causal, .*dual"),
        ("dual:before=-1", "before must be at least 0, not -1"),
        ("dual:around=3", "unknown option 'around'; it has: before, after, warmup, aligned"),
        ("uncached:aligned=maybe", "aligned must be yes or no, not 'maybe'"),
        ("uncached+roll", "unknown addition to a KV scheme 'roll'; known: unroll"),
        ("uncached+unroll+unroll", "at most one addition"),
    ],
)
def test_an_invalid_plan_is_an_error_with_the_valid_values(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_kv_scheme(text)


def test_the_token_in_place_of_a_proposed_mask_has_its_own_confidence() -> None:
    shares = torch.tensor([[0.1, 0.3, 0.6], [0.2, 0.7, 0.1]])
    proposal = propose(shares.log(), Sampling(), 2, torch.Generator())
    assert (proposal.ids.tolist(), proposal.unmasked_ids.tolist()) == ([2, 1], [1, 1])
    torch.testing.assert_close(proposal.confidence, torch.tensor([0.6, 0.7]))
    torch.testing.assert_close(proposal.confidence_of(proposal.ids), proposal.confidence)
    torch.testing.assert_close(
        proposal.confidence_of(proposal.unmasked_ids), torch.tensor([0.3, 0.7])
    )
