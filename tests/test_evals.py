"""Intervals, paired tests, and the exam that they are for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import coterie
from coterie.evals.exam import items, sit
from coterie.evals.report import lines
from coterie.evals.stats import Share, paired
from coterie.problems import TASKS, split_of
from coterie.testing import write_checkpoint

answers = st.lists(st.booleans(), min_size=1, max_size=60)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_the_share_and_mirrors(counted):
    right, n = counted
    low, high = Share(right, n).interval
    assert 0 <= low <= right / n <= high <= 1
    mirrored = Share(n - right, n).interval
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_known_values_of_the_interval_and_of_the_exact_test():
    assert Share(15, 20).interval == pytest.approx((0.5313, 0.8881), abs=1e-4)
    first = [True] * 10 + [False] * 2 + [True] * 8
    second = [False] * 10 + [True] * 2 + [True] * 8
    assert paired(first, second).p == pytest.approx(0.0385742, abs=1e-7)


@given(answers)
def test_equal_answers_do_not_differ(right):
    found = paired(right, right)
    assert (found.difference, found.p, found.interval) == (0.0, 1.0, (0.0, 0.0))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_difference_changes_sign_with_the_order(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    one, other = paired(first, second), paired(second, first)
    assert one.difference == -other.difference == (sum(second) - sum(first)) / len(pairs)
    assert one.p == other.p


def test_lists_that_do_not_pair_raise():
    with pytest.raises(ValueError, match="1 and 2"):
        paired([True], [True, False])


@given(st.integers(0, 2**32))
def test_items_are_held_out_and_a_task_does_not_disturb_another(seed):
    whole = items(list(TASKS), 2, seed)
    assert all(split_of(item.problem.key) == "test" for item in whole)
    assert [item.problem for item in items(["algebra"], 2, seed)] == [
        item.problem for item in whole if item.problem.task == "algebra"
    ]


def test_rows_decoded_together_answer_as_rows_alone_do(tmp_path):
    write_checkpoint(tmp_path / "tiny", "llada2", seed=3, vocab_size=300)
    engine = coterie.load(tmp_path / "tiny", max_new_tokens=24, block=8)
    asked = items(["words", "docstring"], 2, seed=0)
    heard = []
    alone, together = (
        sit(engine, asked, "des-vote:beta=0.5", rows=rows, told=heard.append) for rows in (1, 4)
    )
    assert len(heard) == 2 * len(asked)
    assert [a.result.tokens for a in alone.answers] == [a.result.tokens for a in together.answers]
    assert alone.experts == pytest.approx(together.experts)
    first, second = lines([alone, together], ["words", "docstring"])
    assert first.change is None
    assert second.change is not None
    assert second.change.difference == 0
    assert first.whole.n == 4


def test_only_forwards_that_were_counted_weigh(tmp_path):
    write_checkpoint(tmp_path / "tiny", "llada-moe", seed=3, vocab_size=300)
    engine = coterie.load(tmp_path / "tiny", max_new_tokens=16, block=8, plan="dual")
    asked = items(["words", "docstring", "algebra"], 2, seed=0)
    sheet = sit(engine, asked, "des-vote:beta=0.25", rows=4, told=lambda _: None)
    results = [answer.result for answer in sheet.answers]
    assert all(0 < r.experts.forwards < r.forwards for r in results)  # a re-forward at each block
    assert min(r.experts.mean for r in results) <= sheet.experts <= 4
    weighed = sum(r.experts.mean * r.experts.forwards for r in results)
    assert sheet.experts == pytest.approx(weighed / sum(r.experts.forwards for r in results))
    engine.generation = engine.generation.but(unmask="threshold:p=1e-9")
    at_once = sit(engine, asked, "des-vote:beta=0.25", rows=4, told=lambda _: None)
    assert (at_once.experts, at_once.vote_mass_kept, at_once.forwards_per_block) == (0.0, 1.0, 1.0)
