"""Intervals and tests: against scipy, against hand-computed cases, and what must always hold."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coterie.lab.evals.stats import (
    Z_95,
    PairedDifference,
    Proportion,
    holm_adjust,
    paired_difference,
    unchanged_bound,
)

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
counts = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def of(gained: int, lost: int, same: int) -> tuple[list[bool], list[bool]]:
    """Two lists that differ so often each way; ``same`` items are right in both."""
    first = [False] * gained + [True] * lost + [True] * same
    return first, [True] * gained + [False] * lost + [True] * same


@given(counts)
def test_the_interval_is_wilsons(counted: tuple[int, int]) -> None:
    correct, n = counted
    theirs = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert Proportion(correct, n).interval == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(counts)
def test_the_interval_holds_the_share_and_mirrors(counted: tuple[int, int]) -> None:
    correct, n = counted
    low, high = Proportion(correct, n).interval
    assert 0 <= low <= correct / n <= high <= 1
    mirrored = Proportion(n - correct, n).interval
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_intervals_computed_by_hand() -> None:
    # z = 1.96: centre (p + z^2/2n) / (1 + z^2/n), half-width z/(1 + z^2/n) sqrt(pq/n + z^2/4n^2)
    assert Proportion(15, 20).interval == pytest.approx((0.531299, 0.888138), abs=1e-5)
    assert Proportion(0, 10).interval == pytest.approx((0.0, 0.277533), abs=1e-5)
    assert Proportion(1319, 1319).interval == pytest.approx((0.997096, 1.0), abs=1e-5)


@given(st.integers(0, 400), st.integers(0, 400))
def test_p_is_the_exact_binomial_test_of_the_changes(gained: int, lost: int) -> None:
    result = paired_difference(*of(gained, lost, 1)).p_value
    if gained + lost == 0:
        assert result == 1.0
    else:
        assert result == pytest.approx(stats.binomtest(gained, gained + lost, 0.5).pvalue, rel=1e-9)


def test_p_computed_by_hand() -> None:
    # 2 (1 + 12 + 66) / 2^12, 2 / 2^6, and 2 (1 + 5) / 2^5
    assert paired_difference(*of(2, 10, 8)).p_value == pytest.approx(158 / 4096)
    assert paired_difference(*of(6, 0, 3)).p_value == pytest.approx(2 / 64)
    assert paired_difference(*of(1, 4, 0)).p_value == pytest.approx(12 / 32)
    assert paired_difference(*of(3, 3, 0)).p_value == 1.0
    assert paired_difference(*of(0, 1319, 0)).p_value == pytest.approx(2.0**-1318)


@given(pairs)
def test_the_difference_changes_sign_with_the_order(answers: Sequence[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in answers], [b for _, b in answers]
    forward, other = paired_difference(first, second), paired_difference(second, first)
    assert forward.difference == -other.difference
    assert forward.difference == pytest.approx((sum(second) - sum(first)) / len(answers))
    assert forward.p_value == other.p_value
    low, high = forward.interval
    assert -1 <= low <= forward.difference <= high <= 1
    assert low < high


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_equal_answers_do_not_differ(correct: list[bool]) -> None:
    result, bound = paired_difference(correct, correct), unchanged_bound(len(correct))
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert result.interval == pytest.approx((-bound, bound), abs=1e-9)
    assert 0 < bound < 1


@given(pairs, st.randoms())
def test_the_order_of_the_items_does_not_matter(
    answers: list[tuple[bool, bool]], rng: random.Random
) -> None:
    shuffled = list(answers)
    rng.shuffle(shuffled)
    assert paired_difference(*map(list, zip(*answers, strict=True))) == paired_difference(
        *map(list, zip(*shuffled, strict=True))
    )


@given(st.integers(0, 40), st.integers(0, 40), st.integers(80, 500))
def test_the_score_interval_holds_the_difference_and_mirrors(a: int, b: int, n: int) -> None:
    forward, other = (PairedDifference(*changed, n) for changed in ((a, b), (b, a)))
    low, high = forward.interval
    assert -1 <= low < forward.difference < high <= 1
    assert other.interval == (-high, -low)
    wider = PairedDifference(a, b, n), PairedDifference(2 * a, 2 * b, 2 * n)
    assert np.diff(wider[0].interval) > np.diff(wider[1].interval)


@pytest.mark.parametrize("n", [4, 50, 1000])
def test_the_score_interval_of_no_change_is_known(n: int) -> None:
    """Its ends solve n d / (1 - d) = Z^2."""
    end = Z_95**2 / (n + Z_95**2)
    assert PairedDifference(0, 0, n).interval == pytest.approx((-end, end), abs=1e-9)


def test_the_score_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, n = np.random.default_rng(3), 120
    covered = 0
    for gained, lost, _ in draw.multinomial(n, [0.02, 0.06, 0.92], size=800):
        low, high = PairedDifference(int(gained), int(lost), n).interval
        covered += low <= -0.04 <= high
    assert 0.92 < covered / 800 < 0.98


def test_lists_that_do_not_pair_raise() -> None:
    with pytest.raises(ValueError, match="1 and 2"):
        paired_difference([True], [True, False])
    with pytest.raises(ValueError, match="0 and 0"):
        paired_difference([], [])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_raises_in_the_order_of_the_ps(ps: list[float]) -> None:
    raised = holm_adjust(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, raised, strict=True))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [raised[i] for i in order] == sorted(raised)
    for level in (0.01, 0.05):  # Holm's own wording: step down, stop at the first that fails
        rejected = 0
        for rank, i in enumerate(order):
            if ps[i] * (len(ps) - rank) > level:
                break
            rejected += 1
        assert sum(p <= level for p in raised) == rejected


def test_holm_computed_by_hand() -> None:
    assert holm_adjust([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
