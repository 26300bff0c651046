"""Comparisons of policies: paired results, matched sizes, and cached grades."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_study import QUIZ, lab, tally

from coterie.lab.evals.run import Variant
from coterie.lab.evals.task import Grade, Item
from coterie.lab.plotting import pareto_front
from coterie.lab.study.comparison import claim_finding, compare_pairs, is_better
from coterie.lab.study.experts_per_token import LimitTopK, evaluate_policy
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.variants import (
    MAX_EXPERT_DIFFERENCE,
    coreset_size,
    run_comparison,
    vote_of_size,
)
from coterie.routing import Vanilla, parse_policy, route
from coterie.values import RouterSpec, Scores

BITS = st.integers(2, 40).flatmap(lambda n: st.tuples(*[st.text("01", min_size=n, max_size=n)] * 2))


@given(BITS)
def test_variant_result_round_trip(bits: tuple[str, str]) -> None:
    first, second = tally("vanilla", bits[0]), tally("topk:k=2", bits[1])
    document = json.loads(json.dumps(second.to_json(first)))
    assert VariantResult.from_json(document) == second
    right = sum(digit == "1" for digit in bits[1])
    assert document["accuracy"]["right"] == right
    changed = sum(int(b) - int(a) for a, b in zip(*bits, strict=True))
    assert document["change"]["gained"] - document["change"]["lost"] == changed


@given(st.lists(BITS, min_size=1, max_size=4))
def test_comparison_is_antisymmetric(pairs: list[tuple[str, str]]) -> None:
    forth = compare_pairs([(tally("a", a), tally("b", b)) for a, b in pairs])
    back = compare_pairs([(tally("b", b), tally("a", a)) for a, b in pairs])
    assert [duel.sign for duel in forth] == [-duel.sign for duel in back]
    if {duel.sign for duel in forth} == {0}:
        assert is_better(forth) is is_better(back) is None


def test_claim_holds_with_wins_and_no_losses() -> None:
    names = {"second": "b", "first": "a", "condition": "at equal experts"}
    bad, good = "0" * 30 + "1" * 10, "1" * 40
    won, lost = (tally("a", bad), tally("b", good)), (tally("a", good), tally("b", bad))
    even = (tally("a", good), tally("b", good))
    assert is_better(compare_pairs([won, even])) is True
    assert is_better(compare_pairs([won, lost])) is False
    assert is_better(compare_pairs([even])) is None
    told = claim_finding("B is better.", [won, even], **names)
    assert "better than a in 1, worse in 0 and not significantly different in 1" in told.text
    assert "+75.0%" in told.text
    assert claim_finding("B is better.", [], **names).verdict == "inconclusive"


POINTS = st.lists(
    st.tuples(st.floats(0, 99), st.text("01", min_size=8, max_size=8)), min_size=1, max_size=12
)


@given(POINTS)
def test_pareto_front_of_results(
    points: list[tuple[float, str]],
) -> None:
    tallies = [tally(str(n), right, experts) for n, (experts, right) in enumerate(points)]
    front = pareto_front(tallies, lambda one: (one.experts, one.accuracy))
    for one, other in pairwise(front):
        assert one.experts <= other.experts
        assert one.accuracy < other.accuracy
    for one in tallies:
        assert any(f.experts <= one.experts and f.accuracy >= one.accuracy for f in front)


@given(st.integers(1, 512).flatmap(lambda total: st.tuples(st.integers(1, total), st.just(total))))
def test_vote_of_size_has_that_size(sizes: tuple[int, int]) -> None:
    size, total = sizes
    assert coreset_size(vote_of_size(size, total).policy, total) == size


def test_votes_are_matched_at_equal_experts(tmp_path: Path) -> None:
    others = ["topk:k={1,2}", "random:beta=0.5"]
    votes = "des-vote:beta={0.25,0.75}"
    arms = run_comparison(
        lab(tmp_path), {"votes": votes, "others": others}, rivals={"des-vote": others}
    )
    assert arms.pairs
    for other, vote in arms.pairs:
        assert other.name in {"topk:k=1", "topk:k=2", "random:beta=0.5"}
        assert vote.name.startswith("des-vote:beta=")
        assert abs(other.experts - vote.experts) <= MAX_EXPERT_DIFFERENCE


def test_comparison_uses_the_same_items(tmp_path: Path) -> None:
    measured = run_comparison(lab(tmp_path), {"all": "des-vote:beta=1.0"})
    arms = VariantResults.from_record(json.loads(json.dumps(measured.to_record())))
    assert arms == measured
    assert arms.vanilla.name == "vanilla"
    seq = arms.groups["all"][0]
    assert seq.correct_flags() == arms.vanilla.correct_flags()  # with all experts in the coreset
    assert seq.experts == arms.vanilla.experts
    assert arms.vanilla.accuracy_share().n == 6


def test_grades_are_cached_by_item_and_output() -> None:
    graded = []

    def grade(output: str, item: Item) -> Grade:
        graded.append((item.id, output))
        return QUIZ.grader(output, item)

    task = replace(QUIZ, grader=grade).with_cached_grades()
    first, second = task.items()[:2]
    outputs = ["1 2", "3 4", "1 2"]
    told = [task.grade(output, item) for item in (first, second) for output in outputs]
    assert told == [QUIZ.grade(output, item) for item in (first, second) for output in outputs]
    assert len(graded) == 4


SCORES = st.tuples(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 4))


@given(SCORES)
def test_limited_k_uses_the_best_of_the_coreset(drawn: tuple[int, int, int]) -> None:
    seed, tokens, k = drawn
    router = RouterSpec(experts=16, k=4, activation="sigmoid", renormalise=True)
    logits = torch.randn((2, tokens, 16), generator=torch.Generator().manual_seed(seed))
    scores = Scores(logits=logits, router=router)
    wide = parse_policy("des-vote:beta=0.5")
    ids = route(scores, wide).topk_ids
    assert route(scores, LimitTopK(wide, k)).topk_ids[:, :k].equal(ids[:, :k])
    assert (route(scores, LimitTopK(wide, k)).topk_ids[:, k:] == -1).all()
    assert route(scores, LimitTopK(Vanilla(), 4)).topk_ids.equal(route(scores, Vanilla()).topk_ids)


def test_policy_object_equals_its_spelling(tmp_path: Path) -> None:
    asked = lab(tmp_path)
    own = evaluate_policy(asked, parse_policy("topk:k=2"), "mine", "topk:k=2")
    kept = asked.evaluate([Variant("topk:k=2")])[0]
    same = replace(own, name=kept.name, tokens_per_second=kept.tokens_per_second)
    assert same == kept
