"""Decoding by example: every rule, plan and refinement on numbers small enough to check by eye."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from coterie.decoding import DecodeRequest, Sampling, SequenceState, parse_plan, parse_unmask
from coterie.decoding.canvas import Block
from coterie.decoding.kv_schemes import StepCounter
from coterie.decoding.refinements import Credit, Smooth
from coterie.decoding.sampling import Proposal, propose
from coterie.decoding.unmask import BlockState
from coterie.errors import CoterieError

MASK = 3


def moment(
    confidence: list[float],
    *,
    masked: str = "",
    ids: list[int] | None = None,
    entropy: list[float] | None = None,
    step: int = 0,
    floor: float = -math.inf,
) -> BlockState:
    """``masked``: one letter a position, "m" = masked; all of them by default."""
    width = len(confidence)
    hidden = torch.tensor([letter == "m" for letter in masked or "m" * width])
    proposed = torch.tensor(ids or [1] * width)
    return BlockState(
        Proposal(
            proposed,
            torch.tensor(confidence),
            proposed,
            torch.tensor(confidence),
            entropy=None if entropy is None else torch.tensor(entropy),
        ),
        tokens=torch.where(hidden, MASK, 0),
        masked=hidden,
        generated=~hidden,
        mask_id=MASK,
        step=step,
        initial_masked=int(hidden.sum()),
        threshold_floor=floor,
    )


def chosen(rule: str, seen: BlockState) -> list[int]:
    return parse_unmask(rule).rule.choose(seen).nonzero()[:, 0].tolist()


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
    assert chosen(rule, moment(confidence)) == expected


def test_a_position_that_proposes_the_mask_is_passed_over() -> None:
    seen = moment([0.99, 0.5, 0.2], ids=[MASK, 1, 2])
    assert chosen("threshold:p=0.9", seen) == [1]


def test_smoothing_raises_thresholds() -> None:
    confidence = [0.95, 0.92, 0.1]
    assert chosen("threshold:p=0.9", moment(confidence, floor=0.94)) == [0]
    assert chosen("hierarchy:p=0.9,low=0.93", moment(confidence, floor=0.94)) == [0]


def test_hierarchy_takes_the_peak_of_every_run() -> None:
    seen = moment([0.3, 0.5, 0.9, 0.45, 0.4, 0.2, 0.1], masked="mm.mm.m")
    assert chosen("hierarchy:p=0.8,low=0.4", seen) == [1, 3]
    assert chosen("hierarchy:p=0.8,low=0.95", seen) == [1]


def test_entropy_takes_the_least_uncertain_under_the_bound() -> None:
    seen = moment([0.5] * 4, entropy=[0.3, 0.05, 0.2, 0.1])
    assert chosen("entropy:bound=0.36", seen) == [1, 2, 3]
    assert chosen("entropy:bound=0.01", seen) == [1]


def test_a_schedule_gives_its_first_steps_more() -> None:
    counts = [len(chosen("static:steps=3", moment([0.1] * 8, step=step))) for step in range(3)]
    assert counts == [3, 3, 2]


def test_editing_replaces_sure_answers_only() -> None:
    edit = parse_unmask("threshold+edit:p=0.5").edit
    assert edit is not None
    seen = moment([0.6, 0.4, 0.9, 0.7], masked="..m.", ids=[1, 1, 1, 0])
    assert edit.choose(seen).nonzero()[:, 0].tolist() == [0]


def test_credit_favours_what_was_proposed_before() -> None:
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


def test_dual_refreshes_then_looks_around() -> None:
    plan = parse_plan("dual:before=4,after=6")
    block = Block(1, 16, 24)
    first, second = (plan.next_pass(block, 27, StepCounter(5 + n, n)) for n in range(2))
    assert (first.kind, first.start, first.stop, first.voters) == ("refresh", 0, 27, (16, 24))
    assert (second.kind, second.start, second.stop, second.visible) == ("decode", 12, 27, 27)
    assert second.voters == (12, 27)


def test_warm_up_is_uncached() -> None:
    plan = parse_plan("dual:warmup=2")
    looks = [plan.next_pass(Block(0, 0, 8), 16, StepCounter(n, n)) for n in range(4)]
    assert [look.use_cache for look in looks] == [False, False, True, True]
    assert [look.kind for look in looks] == ["decode", "decode", "refresh", "decode"]


def test_unrolling_counts_a_refreshing_round_twice() -> None:
    plan = parse_plan("dual+unroll:most=4,tokens=8")
    block = Block(0, 0, 32)
    assert plan.steps_until_check(block, 64, StepCounter(), num_masked=32) == 5
    assert plan.steps_until_check(block, 64, StepCounter(3, 3), num_masked=17) == 2
    assert plan.steps_until_check(block, 64, StepCounter(3, 3), num_masked=7) == 1


def test_block_causal_prefills_whole_blocks_and_commits() -> None:
    plan = parse_plan("block-causal")
    blocks = plan.blocks(21, 20, 8)
    assert [(b.start, b.stop) for b in blocks] == [(16, 24), (24, 32), (32, 40), (40, 48)]
    (prefill,) = plan.prefill_passes(blocks[0])
    assert (prefill.stop, prefill.causal_block, prefill.kind) == (16, 8, "prefill")
    (commit,) = plan.commit_passes(blocks[0])
    assert (commit.start, commit.visible, commit.kind) == (16, 24, "commit")
    assert plan.prefill_passes(Block(0, 0, 8)) == ()


def ask(**changes: object) -> DecodeRequest:
    values: dict[str, object] = {
        "prompt": (1, 2),
        "new": 6,
        "block": 3,
        "plan": parse_plan("uncached"),
        "unmask": parse_unmask("threshold:p=0.9"),
        "sampling": Sampling(),
        "seed": 0,
        "early_stop": "block",
        "stops": (0,),
        "mask": MASK,
    }
    return DecodeRequest(**(values | changes))  # type: ignore[arg-type]


def sure(ids: list[int]) -> Tensor:
    """Logits that put nearly everything on these ids."""
    return 30.0 * torch.nn.functional.one_hot(torch.tensor(ids), 4).float()


def test_a_row_stops_after_the_block_that_ends_the_text() -> None:
    row = SequenceState(ask())
    row.receive(sure([1, 0, 2]))
    assert row.next_pass is None
    assert (row.answer, row.ended_by_eos) == ([1], True)


def test_a_row_that_may_not_stop_goes_on() -> None:
    row = SequenceState(ask(early_stop="off"))
    row.receive(sure([1, 0, 2]))
    assert row.next_pass is not None
    row.receive(sure([2, 2, 2]))
    assert (row.answer, row.ended_by_eos) == ([1, 0, 2, 2, 2, 2], False)


def test_a_token_stop_waits_for_what_comes_before() -> None:
    row = SequenceState(ask(early_stop="token", unmask=parse_unmask("sequential:steps=3")))
    row.receive(sure([1, 0, 2]))
    assert row.next_pass is not None
    row.receive(sure([1, 0, 2]))
    assert row.next_pass is None
    assert row.stopped_early
    assert row.answer == [1]
    assert row.canvas.tokens.tolist() == [1, 2, 1, 0, MASK, MASK, MASK, MASK]


def test_editing_goes_on_until_nothing_changes() -> None:
    row = SequenceState(ask(new=3, unmask=parse_unmask("threshold:p=0.9+edit:p=0.5,post=16")))
    row.receive(sure([1, 1, 1]))
    change = row.receive(sure([1, 2, 1]))
    assert [(t.position, t.id) for t in change.edited] == [(1, 2)]
    row.receive(sure([1, 2, 1]))
    assert row.next_pass is None
    assert row.steps.total == 3


def test_editing_ends_after_its_post_steps() -> None:
    row = SequenceState(ask(new=3, unmask=parse_unmask("threshold:p=0.9+edit:p=0.5,post=2")))
    for number in range(3):
        row.receive(sure([1, 1 + number % 2, 1]))
    assert row.next_pass is None


def test_masks_that_are_proposed_again_do_not_hold_a_row_up() -> None:
    row = SequenceState(ask(new=3, unmask=parse_unmask("fixed:steps=3")))
    for _ in range(3):
        row.receive(sure([MASK, MASK, MASK]))
    assert row.next_pass is None
    assert MASK not in row.canvas.tokens.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_lose_nothing(bad: float) -> None:
    row, untroubled = (
        SequenceState(ask(sampling=Sampling(3.0))),
        SequenceState(ask(sampling=Sampling(3.0))),
    )
    look, before = row.next_pass, row.canvas.tokens.tolist()
    logits = sure([1, 1, 1])
    logits[1, 2] = bad
    with pytest.raises(CoterieError, match="not finite"):
        row.receive(logits)
    assert (row.next_pass, row.canvas.tokens.tolist(), row.steps) == (look, before, StepCounter())
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert row.receive(logits) == untroubled.receive(logits)


def test_equal_logits_go_to_the_lower_id() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert propose(logits, Sampling(), MASK, draw).ids.tolist() == [1]
    assert propose(logits, Sampling(1.0, top_k=1), MASK, draw).ids.tolist() == [1]


def test_draws_follow_the_probabilities() -> None:
    draw = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = propose(shares.log().expand(4000, 4), Sampling(1.0), 9, draw).ids
    found = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(found, shares, atol=0.02)


def test_temperature_sharpens() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    cold = propose(logits, Sampling(0.25), 9, draw)
    expected = 0.5**4 / (0.5**4 + 0.3**4 + 0.15**4 + 0.05**4)
    assert (cold.ids == 0).float().mean().item() == pytest.approx(expected, abs=0.02)
    assert cold.confidence[cold.ids == 0][0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "told"),
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
def test_a_wrong_unmasking_is_told_what_would_be_right(text: str, told: str) -> None:
    with pytest.raises(CoterieError, match=told):
        parse_unmask(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("duel", "unknown plan 'duel'; known: block-causal, .*dual"),
        ("dual:before=-1", "before must be at least 0, not -1"),
        ("dual:around=3", "unknown option 'around'; it has: before, after, warmup, aligned"),
        ("uncached:aligned=maybe", "aligned must be yes or no, not 'maybe'"),
        ("uncached+roll", "unknown addition to a plan 'roll'; known: unroll"),
        ("uncached+unroll+unroll", "at most one addition"),
    ],
)
def test_a_wrong_plan_is_told_what_would_be_right(text: str, told: str) -> None:
    with pytest.raises(CoterieError, match=told):
        parse_plan(text)


def test_a_token_written_for_a_proposed_mask_has_its_own_confidence() -> None:
    shares = torch.tensor([[0.1, 0.3, 0.6], [0.2, 0.7, 0.1]])
    found = propose(shares.log(), Sampling(), 2, torch.Generator())
    assert (found.ids.tolist(), found.unmasked_ids.tolist()) == ([2, 1], [1, 1])
    torch.testing.assert_close(found.confidence, torch.tensor([0.6, 0.7]))
    torch.testing.assert_close(found.confidence_of(found.ids), found.confidence)
    torch.testing.assert_close(found.confidence_of(found.unmasked_ids), torch.tensor([0.3, 0.7]))
