"""Calibration: what is found meets the target, its neighbour does not, and the proof is kept."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import coterie
from coterie.errors import CoterieError
from coterie.lab.calibration import (
    CalibrationPrompt,
    PolicyEvaluator,
    PromptSet,
    Target,
    TaskOptions,
    calibrate,
    prompts_from_file,
    prompts_from_tasks,
)
from coterie.lab.calibration.budget import allocation_order, experts_per_layer
from coterie.lab.calibration.calibration import measure_policies
from coterie.lab.calibration.frontier import best_point
from coterie.lab.calibration.interval import drop_interval
from coterie.lab.calibration.measurement import VANILLA
from coterie.lab.calibration.search import BoundarySearch
from coterie.lab.calibration.search_space import SearchFamily, searchable_families
from coterie.lab.calibration.target import Estimate
from coterie.lab.evals.stats import ratio_interval
from coterie.lab.problems import PROBLEM_MAKERS, draw_problem, split_of
from coterie.routing import format_policy, parse_policy, route
from coterie.testing import write_checkpoint
from coterie.values import RouterSpec

ROUTER = RouterSpec(experts=16, k=4, activation="sigmoid", renormalise=True)


def reading(value: float) -> Estimate:
    return Estimate(value, (value, value), 1)


def looking(values: Sequence[float], target: Target, searcher: BoundarySearch):
    """What a search finds on a ladder of these values, and the rungs that it measured."""
    measured: list[int] = []

    def measure(rungs: Sequence[int]) -> list[Estimate]:
        assert list(rungs) == sorted(rungs)
        assert 1 <= len(rungs) <= max(1, searcher.batch_size)
        measured.extend(rungs)
        return [reading(values[rung]) for rung in rungs]

    return searcher.find(target, len(values), measure), measured


ladders = st.lists(st.integers(1, 40), min_size=1, max_size=200)
searchers = st.builds(BoundarySearch, together=st.integers(1, 9), coarse=st.integers(1, 9))
kinds = st.sampled_from(["experts", "mass", "loss", "drop"])


@given(ladders, kinds, searchers, st.data())
def test_on_an_ordered_ladder_the_search_finds_what_a_scan_does(numbers, kind, searcher, data):
    falls = kind in ("experts", "mass")
    values = [n / 40 for n in sorted(numbers, reverse=falls)]
    target = Target(kind, data.draw(st.sampled_from(values)))
    found, measured = looking(values, target, searcher)
    meeting = [rung for rung, value in enumerate(values) if target.is_met(reading(value))]
    assert found.index == (meeting[0] if kind == "experts" else meeting[-1])
    assert found.is_monotonic
    assert len(measured) == len(set(measured))
    if searcher == BoundarySearch():
        assert len(measured) <= math.ceil(math.log2(len(values) + 1))


@given(ladders, kinds, searchers, st.integers(1, 40))
def test_on_any_ladder_what_is_found_meets_the_target_and_its_neighbour_fails(
    numbers, kind, searcher, wanted
):
    values, target = [n / 40 for n in numbers], Target(kind, wanted / 40)
    assume(target.is_met(reading(values[-1 if kind == "experts" else 0])))
    found, measured = looking(values, target, searcher)
    assert target.is_met(reading(values[found.index]))
    beside = found.index - 1 if kind == "experts" else found.index + 1
    if 0 <= beside < len(values):
        assert beside in measured
        assert not target.is_met(reading(values[beside]))
    falls = kind in ("experts", "mass")
    seen = [values[rung] for rung in sorted(set(measured))]
    assert found.is_monotonic == (seen == sorted(seen, reverse=falls))


@given(ladders, kinds, searchers)
def test_a_target_that_no_rung_meets_is_told_with_the_range(numbers, kind, searcher):
    values = [n / 50 for n in numbers]
    target = Target(kind, 0.9 if kind == "mass" else 0.01)
    low, high = sorted((values[0], values[-1]))
    with pytest.raises(
        CoterieError, match=f"no rung meets {target}: .* goes {low:.4g} to {high:.4g}"
    ):
        looking(values, target, searcher)


def test_a_coarse_look_stays_on_the_gentle_side_of_the_first_failure():
    drops = [0.0] * 30 + [0.5] * 3 + [0.0] * 67  # it fails, and then seems to recover
    blind, _ = looking(drops, Target("drop", 0.01), BoundarySearch())
    coarse, measured = looking(drops, Target("drop", 0.01), BoundarySearch(initial_points=31))
    assert (blind.index, coarse.index) == (99, 29)
    assert not coarse.is_monotonic
    assert len(measured) < 40


def test_a_coarse_look_ends_where_it_has_failed_twice():
    drops = [0.0] * 30 + [0.5] * 70  # answers take longest at the thrifty end
    found, measured = looking(drops, Target("drop", 0.01), BoundarySearch(initial_points=31))
    assert (found.index, found.is_monotonic) == (29, True)
    assert max(measured) < 40


def test_a_sure_target_is_met_by_the_far_end_of_the_interval():
    doubtful = Estimate(0.5, (0.4, 0.6), 10)
    for kind, near, far in [("experts", 0.5, 0.6), ("mass", 0.5, 0.4), ("drop", 0.5, 0.6)]:
        assert Target.parse(f"{kind}={near}").is_met(doubtful)
        assert not Target.parse(f"{kind}={near}", confident=True).is_met(doubtful)
        assert Target.parse(f"{kind}={far}", confident=True).is_met(doubtful)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed=3", "unknown target 'speed=3'; known: experts=.., mass=.., loss=.., drop=.."),
        ("experts", "unknown target 'experts'"),
        ("experts=many", "target experts must be a number, not 'many'"),
        ("experts=0", "target experts must be above 0, not 0"),
        ("mass=1.5", "target mass must be above 0 and at most 1, not 1.5"),
        ("loss=nan", "target loss must be at least 0, not nan"),
        ("drop=-1", "target drop must be at least 0 and at most 1, not -1"),
    ],
)
def test_a_wrong_target_is_named(text: str, message: str):
    with pytest.raises(CoterieError) as caught:
        Target.parse(text)
    assert str(caught.value).startswith(message)


@given(st.integers(1, 600), st.data())
def test_a_rung_elects_exactly_its_count(experts: int, data):
    router = RouterSpec(experts=experts, k=1, activation="softmax", renormalise=False)
    ladder = SearchFamily.parse("des-vote").search_space(router)
    rung = data.draw(st.integers(0, experts - 1))
    beta = getattr(parse_policy(ladder.policy_at(rung)), "beta")  # noqa: B009
    assert math.floor(beta * experts + 1e-9) == experts - rung


@pytest.mark.parametrize("name", [name for name in searchable_families() if name != "coreset"])
def test_every_rung_of_every_family_is_a_policy(name: str):
    ladder = SearchFamily.parse(name).search_space(ROUTER)
    spelled = [ladder.policy_at(rung) for rung in range(len(ladder))]
    assert len(set(spelled)) == len(ladder) >= ROUTER.k
    assert all(format_policy(parse_policy(text)) == text for text in spelled)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("des-vote:voters=unfilled,protect=top1", "des-vote:beta=1,voters=before-eos,protect=top1",
         "des-vote:beta=0.0625,voters=before-eos,protect=top1"),
        ("coreset:m=?,vote=weight", "coreset:m=16,vote=weight", "coreset:m=1,vote=weight"),
        ("des-vote:beta=?", "des-vote:beta=1", "des-vote:beta=0.0625"),
        ("mass-vote:least=2", "mass-vote:tau=1,least=2", "mass-vote:tau=0.001,least=2"),
        ("naee", "naee:beta=0", "naee:beta=1"),
        ("topk", "topk:k=4", "topk:k=1"),
        ("racing", "racing:m=16", "racing:m=1"),
    ],
)  # fmt: skip
def test_a_ladder_goes_from_gentle_to_thrifty(text: str, first: str, last: str):
    ladder = SearchFamily.parse(text).search_space(ROUTER)
    assert (ladder.policy_at(0), ladder.policy_at(len(ladder) - 1)) == (first, last)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("des-vot", "unknown policy family 'des-vot'; known: topk, naee, "),
        ("vanilla", "vanilla has nothing to search for; families that have: topk, "),
        ("des-vote:beta=0.3", "des-vote: beta is what is searched for; leave it out"),
        ("coreset", "coreset: say which parameter is searched for: coreset:beta=? or coreset:m=?"),
        ("des-vote:voters=?", "des-vote: voters cannot be searched for; beta can"),
        ("coreset:m=?,k=?", "coreset: one parameter is searched for, not m and k"),
        ("des-vote:tau=1", "policy 'des-vote:beta=1.0,tau=1': unknown option 'tau'"),
    ],
)
def test_a_family_that_cannot_be_searched_is_named(text: str, message: str):
    with pytest.raises(CoterieError) as caught:
        SearchFamily.parse(text).search_space(ROUTER)
    assert str(caught.value).startswith(message)


votes = st.integers(1, 3).flatmap(
    lambda layers: st.integers(1, 4).flatmap(
        lambda experts: st.lists(
            st.lists(st.integers(0, 9), min_size=experts, max_size=experts),
            min_size=layers,
            max_size=layers,
        )
    )
)


@given(votes)
def test_budgets_by_marginal_votes_hold_the_most_votes_there_are(found):
    falling = [sorted(layer, reverse=True) for layer in found]
    layers, experts = len(falling), len(falling[0])
    order = allocation_order(torch.tensor(falling, dtype=torch.float64))
    assert sorted(order) == sorted(list(range(layers)) * experts)

    def held(counts: Sequence[int]) -> int:
        return sum(sum(layer[:count]) for layer, count in zip(falling, counts, strict=True))

    for total in range(layers, layers * experts + 1):
        counts = experts_per_layer(order, total)
        assert sum(counts) == total
        assert min(counts) >= 1
        every = product(range(1, experts + 1), repeat=layers)
        assert held(counts) == max(held(other) for other in every if sum(other) == total)


pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(pairs)
def test_the_interval_of_a_drop_holds_it_and_changes_sign_with_the_order(items):
    before, after = [a for a, _ in items], [b for _, b in items]
    low, high = drop_interval(before, after)
    drop = (sum(before) - sum(after)) / len(items)
    assert -1 <= low <= drop + 1e-12
    assert drop <= high + 1e-12 <= 1 + 1e-9
    assert drop_interval(after, before) == pytest.approx((-high, -low), abs=1e-12)


def test_the_interval_of_a_drop_does_not_vanish_where_nothing_changed():
    z = 1.959963984540054
    low, high = drop_interval([True] * 100, [True] * 100)
    assert (low, high) == pytest.approx((-z * z / (100 + z * z), z * z / (100 + z * z)), abs=1e-12)


def test_the_interval_of_a_drop_covers_the_truth():
    rng = random.Random(5)
    inside = 0
    for _ in range(400):
        before = [rng.random() < 0.9 for _ in range(80)]
        after = [right and rng.random() < 0.9 for right in before]
        low, high = drop_interval(before, after)
        inside += low <= 0.09 <= high
    assert 0.93 <= inside / 400 <= 0.99


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), min_size=1, max_size=30))
def test_the_interval_of_a_ratio_lies_between_its_extremes(items):
    parts, wholes = [a for a, _ in items], [b for _, b in items]
    low, high = ratio_interval(parts, wholes)
    ratios = [a / b for a, b in items]
    assert min(ratios) - 1e-9 <= low <= high <= max(ratios) + 1e-9
    assert ratio_interval(parts, wholes) == (low, high)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> PolicyEvaluator:
    """A tiny LLaDA2 with 16 experts and top-4, and four prompts."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), "llada2", seed=3)
    engine = coterie.load(folder, max_new_tokens=8, block=8, unmask="fixed:steps=3")
    asked = [CalibrationPrompt(str(n), f"{n + 3} {5 * n + 1} 7") for n in range(4)]
    return PolicyEvaluator(engine, PromptSet(tuple(asked)), batch_size=4)


def every(bench: PolicyEvaluator, family: str) -> list[str]:
    ladder = SearchFamily.parse(family).search_space(bench.engine.model.spec.router)
    return [ladder.policy_at(rung) for rung in range(len(ladder))]


@pytest.mark.parametrize("family", ["des-vote", "uniform-vote", "des-seq", "topk", "naee"])
def test_experts_fall_along_a_ladder_on_equal_inputs(tiny: PolicyEvaluator, family: str):
    policies = every(tiny, family)[:: 50 if family == "naee" else 1]
    experts = [seen.experts.value for seen in tiny.estimate_on_trace(policies, with_loss=False)]
    assert all(after <= before for before, after in pairwise(experts))
    assert experts[0] > experts[-1]


@pytest.mark.parametrize("protect", ["none", "top1"])
def test_the_mass_falls_along_a_ladder_and_the_experts_are_the_budget(
    tiny: PolicyEvaluator, protect: str
):
    policies = every(tiny, f"des-vote:protect={protect}")
    seen = tiny.estimate_on_trace(policies, with_loss=True)
    mass = [one.mass.value for one in seen]
    assert all(after <= before for before, after in pairwise(mass))
    assert mass[0] == 1
    assert seen[0].estimate("loss").value == 0


def test_votes_for_own_experts_elect_only_used_ones(tiny: PolicyEvaluator):
    """Of a set elected by votes for own experts each is used, until all that vanilla uses are."""
    every_share = [parse_policy(text) for text in every(tiny, "des-vote")]
    looks = 0

    def see(watched, first: int) -> None:
        nonlocal looks
        for row in range(len(watched.rows)):
            own = watched.routing.own.view(*watched.scores.logits.shape[:2], -1)[row]
            for elected, policy in zip(range(16, 0, -1), every_share, strict=True):
                ids = route(watched.scores, policy).topk_ids.view(len(watched.rows), -1)[row]
                used = len(set(ids.tolist()) - {-1})
                assert used == min(elected, len(own.unique()))
                looks += 1

    tiny.observe_vanilla(see, "")
    assert looks > 16 * len(tiny.prompt_set.prompts)


def test_what_is_read_on_the_trace_is_what_decoding_vanilla_tells(tiny: PolicyEvaluator):
    (seen,) = tiny.estimate_on_trace([VANILLA], with_loss=True)
    run = tiny.run(VANILLA)
    assert seen.experts.value == pytest.approx(run.experts_estimate().value)
    assert (seen.mass.value, seen.estimate("loss").value) == (1, 0)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("des-vote", "experts=6"),
        ("des-vote", "mass=0.8"),
        ("des-vote", "loss=0.1"),
        ("uniform-vote", "mass=0.5"),
        ("racing", "loss=0.2"),
        ("des-seq", "experts=7"),
        ("topk", "loss=0.3"),
        ("mass-vote:least=1", "experts=7"),
    ],
)
def test_the_found_policy_is_what_an_exhaustive_search_finds(tiny: PolicyEvaluator, family, target):
    found = calibrate(tiny, family, target)
    policies = every(tiny, family)
    if family.startswith("mass-vote"):
        near = policies.index(found.policy)
        policies = policies[near - 3 : near + 3]
    wanted = Target.parse(target)
    met = [wanted.is_met(one) for one in measure_policies(tiny, wanted.kind, policies)]
    expected = met.index(True) if wanted.kind == "experts" else met.index(False) - 1
    assert found.policy == policies[expected]
    assert wanted.is_met(found.achieved)
    assert found.neighbor is not None
    assert not wanted.is_met(found.neighbor.estimate)
    assert found.is_monotonic


def test_the_same_prompts_find_the_same(tiny: PolicyEvaluator):
    again = PolicyEvaluator(tiny.engine, tiny.prompt_set, batch_size=2)
    first, second = (calibrate(bench, "des-vote", "experts=5") for bench in (tiny, again))
    assert first.policy == second.policy
    assert first.achieved.value == pytest.approx(second.achieved.value)


def test_what_cannot_be_reached_is_told_with_what_can(tiny: PolicyEvaluator):
    low, high = (
        tiny.run(policy).experts_estimate().value for policy in ("des-seq:k=1", "des-seq:k=4")
    )
    told = f"no rung meets experts=1: .* unique experts a layer goes {low:.4g} to {high:.4g}"
    with pytest.raises(CoterieError, match=told):
        calibrate(tiny, "des-seq", "experts=1")


def test_ungraded_prompts_cannot_meet_an_accuracy(tiny: PolicyEvaluator):
    with pytest.raises(CoterieError, match="drop needs graded prompts"):
        calibrate(tiny, "des-vote", "drop=0.1")


def test_two_thresholds_are_searched_along_their_frontier(tiny: PolicyEvaluator):
    target, found = Target.parse("experts=8"), calibrate(tiny, "mc-moe", "experts=8")
    points = found.frontier_points
    assert len(points) >= 2
    betas = [float(point.policy.partition("beta=")[2].partition(",")[0]) for point in points]
    assert betas == sorted(betas)
    before = [
        f"mc-moe:beta={beta - 0.001:.3f},protect={point.protect!r}"
        for beta, point in zip(betas, points, strict=True)
    ]
    for point, gentler in zip(points, tiny.estimate_on_trace(before, with_loss=False), strict=True):
        assert point.experts.value <= 8 < gentler.experts.value
    chosen = best_point(points, target)
    assert chosen.loss.value == min(point.loss.value for point in points)
    assert f"protect={chosen.protect:g}" in found.policy
    assert found.achieved.value <= 8


def test_accuracy_does_not_choose_between_two_thresholds(tiny: PolicyEvaluator):
    graded = PromptSet(
        tuple(CalibrationPrompt(q.id, q.text, bool) for q in tiny.prompt_set.prompts)
    )
    with pytest.raises(CoterieError, match=r"fix one, such as mc-moe:protect=0\.02"):
        calibrate(PolicyEvaluator(tiny.engine, graded), "mc-moe", "drop=0.1")


def test_budgets_of_layers_are_searched_as_one_ladder(tiny: PolicyEvaluator):
    """Of 32 experts in two layers down to two; the shares are exact in counts."""
    found = calibrate(tiny, "des-vote", "mass=0.8", per_layer=True)
    shares = parse_policy(found.policy).beta  # type: ignore[attr-defined]
    counts = [math.floor(share * 16 + 1e-9) for share in shares]
    assert [count / 16 for count in counts] == list(shares)
    assert found.achieved.value >= 0.8 > found.neighbor.estimate.value  # type: ignore[union-attr]
    assert found.is_monotonic
    total = sum(counts)
    others = [(m, total - m) for m in range(max(1, total - 16), min(16, total - 1) + 1)]
    spelled = [f"des-vote:beta={a / 16}/{b / 16}" for a, b in others]
    held = [one.mass.value for one in tiny.estimate_on_trace(spelled, with_loss=False)]
    assert found.achieved.value == pytest.approx(max(held))  # no other split of as many holds more


def test_a_family_without_budgets_of_layers_is_named(tiny: PolicyEvaluator):
    with pytest.raises(CoterieError, match=r"racing has no budget for each layer; .*: des-vote"):
        calibrate(tiny, "racing", "mass=0.8", per_layer=True)


@given(st.integers(0, 2**32))
def test_calibration_asks_nothing_that_an_exam_can_ask(seed: int):
    names = ["words", "algebra"]  # the others look for a sandbox each time
    asked = prompts_from_tasks(names, 3, TaskOptions("llada2", seed=seed)).prompts
    assert len(asked) == 3 * len(names)
    for name, n in product(names, range(3)):
        rng = random.Random(f"calibration/{name}/{seed}")
        drawn = [draw_problem(PROBLEM_MAKERS[name], rng, "train") for _ in range(n + 1)][n]
        assert split_of(drawn.key) == "train"
        assert drawn.prompt in {question.text for question in asked}


def test_a_right_answer_is_right_and_another_is_wrong():
    rng = random.Random("calibration/words/4")
    problem = draw_problem(PROBLEM_MAKERS["words"], rng, "train")
    (question,) = prompts_from_tasks(["words"], 1, TaskOptions("llada2", seed=4)).prompts
    assert question.is_correct is not None
    assert (question.text, question.is_correct(problem.answer)) == (problem.prompt, True)
    assert not question.is_correct(problem.answer + "7")


@pytest.mark.parametrize("target", ["drop=0.1", "experts=38"])
def test_accuracy_and_experts_are_met_on_the_embedded_model(target: str):
    asked = prompts_from_tasks(["words", "algebra"], 3, TaskOptions("llada2", seed=3))
    bench = PolicyEvaluator(coterie.load(), asked, batch_size=12)
    found = calibrate(bench, "des-seq" if target == "drop=0.1" else "uniform-vote", target)
    assert Target.parse(target).is_met(found.achieved)
    assert found.neighbor is None or not Target.parse(target).is_met(found.neighbor.estimate)
    assert found.achieved.n == len(found.vanilla.correct) == 6
    assert found.run.experts_estimate().value < found.vanilla.experts_estimate().value


def test_prompts_come_from_a_file(tmp_path: Path):
    plain, lines = tmp_path / "plain.txt", tmp_path / "some.jsonl"
    plain.write_text("first one\n\nsecond\n")
    lines.write_text('{"prompt": "first one", "id": 3}\n{"prompt": "a\\nb"}\n')
    assert [q.text for q in prompts_from_file(plain).prompts] == ["first one", "second"]
    assert [q.text for q in prompts_from_file(lines).prompts] == ["first one", "a\nb"]
    assert not prompts_from_file(plain).is_graded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"\n \n", "holds no prompts"),
        (b'{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        (b'{"prompt": "a"}\n\n{"question": "b"}', 'line 3: no text under "prompt"'),
        (b'{"prompt": ""}', 'line 1: no text under "prompt"'),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_broken_file_of_prompts_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(CoterieError) as caught:
        prompts_from_file(path)
    assert str(caught.value).startswith(f"{path}")
    assert message in str(caught.value)
