"""Calibration: the selected policy meets the target, and its neighbor does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import coterie
from coterie.engine.observation import LayerObservation
from coterie.errors import ConfigError, CoterieError
from coterie.lab.calibration import (
    CalibrationPrompt,
    PolicyEvaluator,
    PromptSet,
    Target,
    TaskOptions,
    calibrate,
    prompts_from_tasks,
)
from coterie.lab.calibration.calibration import BoundarySearch, best_point, measure_policies
from coterie.lab.calibration.measurement import VANILLA, PolicyRun
from coterie.lab.calibration.search_space import (
    SearchFamily,
    allocation_order,
    experts_per_layer,
    searchable_families,
    sorted_vote_sums,
)
from coterie.lab.calibration.target import Estimate
from coterie.lab.evals.stats import ratio_interval
from coterie.routing import Election, format_policy, parse_policy, route
from coterie.routing.votes import Vote
from coterie.testing import write_checkpoint
from coterie.values import RouterSpec

ROUTER = RouterSpec(experts=16, k=4, activation="sigmoid", renormalise=True)


def estimate(value: float) -> Estimate:
    return Estimate(value, (value, value), 1)


def search(values: Sequence[float], target: Target, searcher: BoundarySearch):
    """The result of a search over candidates with these values, and the measured indices."""
    measured: list[int] = []

    def measure(indices: Sequence[int]) -> list[Estimate]:
        assert list(indices) == sorted(indices)
        assert 1 <= len(indices) <= max(1, searcher.batch_size)
        measured.extend(indices)
        return [estimate(values[index]) for index in indices]

    return searcher.find(target, len(values), measure), measured


value_lists = st.lists(st.integers(1, 40), min_size=1, max_size=200)
searchers = st.builds(
    BoundarySearch, batch_size=st.integers(1, 9), initial_points=st.integers(1, 9)
)
kinds = st.sampled_from(["experts", "mass", "loss", "drop"])


@given(value_lists, kinds, searchers, st.data())
def test_search_of_ordered_values_equals_a_scan(numbers, kind, searcher, data):
    falls = kind in ("experts", "mass")
    values = [n / 40 for n in sorted(numbers, reverse=falls)]
    target = Target(kind, data.draw(st.sampled_from(values)))
    result, measured = search(values, target, searcher)
    meeting = [index for index, value in enumerate(values) if target.is_met(estimate(value))]
    assert result.index == (meeting[0] if kind == "experts" else meeting[-1])
    assert result.is_monotonic
    assert len(measured) == len(set(measured))
    if searcher == BoundarySearch():
        assert len(measured) <= math.ceil(math.log2(len(values) + 1))


@given(value_lists, kinds, searchers, st.integers(1, 40))
def test_result_meets_the_target_and_its_neighbor_does_not(numbers, kind, searcher, bound):
    values, target = [n / 40 for n in numbers], Target(kind, bound / 40)
    assume(target.is_met(estimate(values[-1 if kind == "experts" else 0])))
    result, measured = search(values, target, searcher)
    assert target.is_met(estimate(values[result.index]))
    neighbor = result.index - 1 if kind == "experts" else result.index + 1
    if 0 <= neighbor < len(values):
        assert neighbor in measured
        assert not target.is_met(estimate(values[neighbor]))
    falls = kind in ("experts", "mass")
    ordered = [values[index] for index in sorted(set(measured))]
    assert result.is_monotonic == (ordered == sorted(ordered, reverse=falls))


@given(value_lists, kinds, searchers)
def test_unreachable_target_names_the_range(numbers, kind, searcher):
    values = [n / 50 for n in numbers]
    target = Target(kind, 0.9 if kind == "mass" else 0.01)
    low, high = sorted((values[0], values[-1]))
    with pytest.raises(ConfigError, match=f"no policy meets {target}; .* {low:.4g} to {high:.4g}"):
        search(values, target, searcher)


def test_initial_points_select_before_the_first_failure():
    drops = [0.0] * 30 + [0.5] * 3 + [0.0] * 67  # it fails, and then seems to recover
    blind, _ = search(drops, Target("drop", 0.01), BoundarySearch())
    coarse, measured = search(drops, Target("drop", 0.01), BoundarySearch(initial_points=31))
    assert (blind.index, coarse.index) == (99, 29)
    assert not coarse.is_monotonic
    assert len(measured) < 40


def test_initial_points_end_after_two_failures():
    drops = [0.0] * 30 + [0.5] * 70  # policies with few experts take longest to decode
    result, measured = search(drops, Target("drop", 0.01), BoundarySearch(initial_points=31))
    assert (result.index, result.is_monotonic) == (29, True)
    assert max(measured) < 40


def test_confident_target_uses_the_interval():
    doubtful = Estimate(0.5, (0.4, 0.6), 10)
    for kind, near, far in [("experts", 0.5, 0.6), ("mass", 0.5, 0.4), ("drop", 0.5, 0.6)]:
        assert Target.parse(f"{kind}={near}").is_met(doubtful)
        assert not Target.parse(f"{kind}={near}", confident=True).is_met(doubtful)
        assert Target.parse(f"{kind}={far}", confident=True).is_met(doubtful)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "speed=3",
            "unknown target 'speed=3'; known: experts=.., mass=.., loss=.., drop=.., bits=..",
        ),
        ("experts", "unknown target 'experts'"),
        ("experts=many", "target experts must be a number, not 'many'"),
        ("experts=0", "target experts must be above 0, not 0"),
        ("mass=1.5", "target mass must be above 0 and at most 1, not 1.5"),
        ("bits=-1%", "target bits must be at least 0, not -1%"),
        ("bits=1%%", "target bits must be a number, not '1%%'"),
        ("loss=nan", "target loss must be at least 0, not nan"),
        ("drop=-1", "target drop must be at least 0 and at most 1, not -1"),
    ],
)
def test_invalid_target_raises(text: str, message: str):
    with pytest.raises(CoterieError) as caught:
        Target.parse(text)
    assert str(caught.value).startswith(message)


@given(st.integers(1, 600), st.data())
def test_each_candidate_has_one_expert_less(experts: int, data):
    router = RouterSpec(experts=experts, k=1, activation="softmax", renormalise=False)
    index = data.draw(st.integers(0, experts - 1))
    policy = SearchFamily.parse("des-vote").policies(router)[index]
    beta = getattr(parse_policy(policy), "beta")  # noqa: B009
    assert math.floor(beta * experts + 1e-9) == experts - index


@pytest.mark.parametrize("name", [name for name in searchable_families() if name != "coreset"])
def test_every_candidate_of_every_family_is_a_policy(name: str):
    policies = SearchFamily.parse(name).policies(ROUTER)
    assert len(set(policies)) == len(policies) >= ROUTER.k
    assert all(format_policy(parse_policy(text)) == text for text in policies)


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
def test_candidates_go_from_most_experts_to_fewest(text: str, first: str, last: str):
    policies = SearchFamily.parse(text).policies(ROUTER)
    assert (policies[0], policies[-1]) == (first, last)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("des-vot", "unknown policy 'des-vot'; known: topk, naee, "),
        ("vanilla", "vanilla has no parameter to search; policies with one: topk, "),
        ("des-vote:beta=0.3", "des-vote: name one parameter to search: des-vote:beta=?"),
        ("coreset", "coreset: name one parameter to search: coreset:beta=? or coreset:m=?"),
        ("des-vote:voters=?", "des-vote: name one parameter to search: des-vote:beta=?"),
        ("coreset:m=?,k=?", "coreset: name one parameter to search: "),
        ("des-vote:tau=1", "policy 'des-vote:beta=1.0,tau=1': unknown option 'tau'"),
    ],
)
def test_invalid_family_raises(text: str, message: str):
    with pytest.raises(CoterieError) as caught:
        SearchFamily.parse(text).policies(ROUTER)
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
def test_budgets_per_layer_hold_the_most_votes(votes_by_layer):
    falling = [sorted(layer, reverse=True) for layer in votes_by_layer]
    layers, experts = len(falling), len(falling[0])
    order = allocation_order(torch.tensor(falling, dtype=torch.float64))
    assert sorted(order) == sorted(list(range(layers)) * experts)

    def vote_sum(counts: Sequence[int]) -> int:
        return sum(sum(layer[:count]) for layer, count in zip(falling, counts, strict=True))

    for total in range(layers, layers * experts + 1):
        counts = experts_per_layer(order, total)
        assert sum(counts) == total
        assert min(counts) >= 1
        every = product(range(1, experts + 1), repeat=layers)
        assert vote_sum(counts) == max(vote_sum(other) for other in every if sum(other) == total)


def drop_estimate(before: Sequence[bool], after: Sequence[bool]) -> Estimate:
    runs = [
        PolicyRun((1.0,) * len(correct), (1,) * len(correct), tuple(correct), 1.0, 1.0)
        for correct in (before, after)
    ]
    return runs[1].drop_estimate(runs[0])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_drop_interval_contains_the_drop_and_is_antisymmetric(items):
    before, after = [a for a, _ in items], [b for _, b in items]
    drop = drop_estimate(before, after)
    low, high = drop.interval
    assert drop.value == (sum(before) - sum(after)) / len(items)
    assert -1 <= low <= drop.value <= high <= 1
    assert drop_estimate(after, before).interval == pytest.approx((-high, -low), abs=1e-9)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 5)), min_size=1, max_size=30))
def test_ratio_interval_lies_between_the_extremes(items):
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
    prompts = [CalibrationPrompt(str(n), f"{n + 3} {5 * n + 1} 7") for n in range(4)]
    return PolicyEvaluator(engine, PromptSet(tuple(prompts)), batch_size=4)


def all_policies(evaluator: PolicyEvaluator, family: str) -> list[str]:
    return SearchFamily.parse(family).policies(evaluator.engine.model.spec.router)


@pytest.mark.parametrize("family", ["des-vote", "uniform-vote", "des-seq", "topk", "naee"])
def test_experts_fall_along_the_candidates_on_equal_inputs(tiny: PolicyEvaluator, family: str):
    policies = all_policies(tiny, family)[:: 50 if family == "naee" else 1]
    experts = [measured.value for measured in tiny.measure_on_trace("experts", policies)]
    assert all(after <= before for before, after in pairwise(experts))
    assert experts[0] > experts[-1]


@pytest.mark.parametrize("protect", ["none", "top1"])
def test_mass_falls_along_the_candidates(tiny: PolicyEvaluator, protect: str):
    policies = all_policies(tiny, f"des-vote:protect={protect}")
    estimates = tiny.estimate_on_trace(policies, with_loss=True)
    mass = [estimate["mass"].value for estimate in estimates]
    assert all(after <= before for before, after in pairwise(mass))
    assert mass[0] == 1
    assert estimates[0]["loss"].value == 0


def test_votes_for_vanilla_experts_elect_only_used_experts(tiny: PolicyEvaluator):
    """Each elected expert is used, as long as vanilla routing uses that many."""
    policies = [parse_policy(text) for text in all_policies(tiny, "des-vote")]
    comparisons = 0

    def on_layer(observation: LayerObservation, first_prompt: int) -> None:
        nonlocal comparisons
        rows, shape = len(observation.rows), observation.scores.logits.shape[:2]
        vanilla_ids = observation.routing.vanilla_ids.view(*shape, -1)
        for row in range(rows):
            for elected, policy in zip(range(16, 0, -1), policies, strict=True):
                ids = route(observation.scores, policy).topk_ids.view(rows, -1)[row]
                used = len(set(ids.tolist()) - {-1})
                assert used == min(elected, len(vanilla_ids[row].unique()))
                comparisons += 1

    tiny.observe_vanilla(on_layer, "")
    assert comparisons > 16 * len(tiny.prompt_set.prompts)


def test_vanilla_on_the_trace_equals_decoding_vanilla(tiny: PolicyEvaluator):
    (measured,) = tiny.estimate_on_trace([VANILLA], with_loss=True)
    run = tiny.run(VANILLA)
    assert measured["experts"].value == pytest.approx(run.experts_estimate().value)
    assert (measured["mass"].value, measured["loss"].value) == (1, 0)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("des-vote", "experts=6"),
        ("des-vote", "mass=0.8"),
        ("racing", "loss=0.2"),
        ("mass-vote:least=1", "experts=7"),
        ("racing", "bits=0.5%"),
        pytest.param("des-vote", "loss=0.1", marks=pytest.mark.slow),
        pytest.param("des-seq", "experts=7", marks=pytest.mark.slow),
        pytest.param("topk", "loss=0.3", marks=pytest.mark.slow),
    ],
)
def test_calibration_equals_an_exhaustive_search(tiny: PolicyEvaluator, family, target):
    calibration = calibrate(tiny, family, target)
    policies = all_policies(tiny, family)
    if family.startswith("mass-vote"):
        near = policies.index(calibration.policy)
        policies = policies[near - 3 : near + 3]
    target = Target.parse(target)
    met = [target.is_met(measured) for measured in measure_policies(tiny, target.kind, policies)]
    expected = met.index(True) if target.kind == "experts" else met.index(False) - 1
    assert calibration.policy == policies[expected]
    assert target.is_met(calibration.achieved)
    assert calibration.neighbor is not None
    assert not target.is_met(calibration.neighbor.estimate)
    assert calibration.is_monotonic or target.kind == "bits"  # a random model has no best routing


def test_batch_size_does_not_change_the_policy(tiny: PolicyEvaluator):
    again = PolicyEvaluator(tiny.engine, tiny.prompt_set, batch_size=2)
    first, second = (calibrate(bench, "des-vote", "experts=5") for bench in (tiny, again))
    assert first.policy == second.policy
    assert first.achieved.value == pytest.approx(second.achieved.value)


def test_unreachable_calibration_names_the_range(tiny: PolicyEvaluator):
    low, high = (
        tiny.run(policy).experts_estimate().value for policy in ("des-seq:k=1", "des-seq:k=4")
    )
    with pytest.raises(ConfigError, match=f"no policy meets .* {low:.4g} to {high:.4g}"):
        calibrate(tiny, "des-seq", "experts=1")


def test_bits_are_those_of_worked_answers_and_rise_against_vanilla(tiny: PolicyEvaluator):
    assert Target.parse("bits=+1%") == Target.parse("bits=0.01")
    prompts = [CalibrationPrompt(p.id, p.text, answer="5 6") for p in tiny.prompt_set.prompts]
    answered = PolicyEvaluator(tiny.engine, PromptSet(tuple(prompts)))
    assert answered.bits_estimate("vanilla").value == 0
    assert answered.bits_estimate("des-vote:beta=1.0").value == pytest.approx(0, abs=1e-6)
    run = answered.text_run("topk:k=1")
    assert run.experts_estimate().value < answered.text_run("vanilla").experts_estimate().value
    nats, whole = (
        [score.mean_nats for score in each.text_scores("vanilla")] for each in (answered, tiny)
    )
    assert nats != whole


def test_drop_needs_graded_prompts(tiny: PolicyEvaluator):
    with pytest.raises(ConfigError, match="graded prompts"):
        calibrate(tiny, "des-vote", "drop=0.1")


def test_two_thresholds_are_searched_along_their_frontier(
    tiny: PolicyEvaluator, monkeypatch: pytest.MonkeyPatch
):
    values = "coterie.lab.calibration.calibration.PROTECT_VALUES"
    monkeypatch.setattr(values, (0.0, 0.3))
    target, result = Target.parse("experts=8"), calibrate(tiny, "mc-moe", "experts=8")
    points = result.frontier_points
    assert len(points) >= 2
    betas = [float(point.policy.partition("beta=")[2].partition(",")[0]) for point in points]
    assert betas == sorted(betas)
    before = [
        f"mc-moe:beta={beta - 0.001:.3f},protect={point.protect!r}"
        for beta, point in zip(betas, points, strict=True)
    ]
    for point, more in zip(points, tiny.measure_on_trace("experts", before), strict=True):
        assert point.experts.value <= 8 < more.value
    best = best_point(points, target)
    assert best.loss.value == min(point.loss.value for point in points)
    assert f"protect={best.protect:g}" in result.policy
    assert result.achieved.value <= 8


def test_drop_cannot_select_two_thresholds(tiny: PolicyEvaluator):
    graded = PromptSet(
        tuple(CalibrationPrompt(q.id, q.text, bool) for q in tiny.prompt_set.prompts)
    )
    with pytest.raises(CoterieError, match=r"fix one, such as mc-moe:protect=0\.02"):
        calibrate(PolicyEvaluator(tiny.engine, graded), "mc-moe", "drop=0.1")


@pytest.mark.parametrize("vote", ["topk-prob", "full", "max"])
def test_votes_of_layers_are_those_of_admitted_experts(tmp_path: Path, vote: Vote):
    """One block of 32 positions admits 5 of 16 experts."""
    folder = write_checkpoint(tmp_path / "model", "llada2.2", expert_capacity=5)
    engine = coterie.load(folder, max_new_tokens=8, unmask="fixed:steps=2")
    prompts = PromptSet((CalibrationPrompt("0", "3 5 7"),))
    sums = sorted_vote_sums(PolicyEvaluator(engine, prompts), Election(vote=vote))
    assert (sums > 0).sum(dim=1).tolist() == [5, 5]


def test_budgets_per_layer_keep_the_most_votes(tiny: PolicyEvaluator):
    calibration = calibrate(tiny, "des-vote", "mass=0.8", per_layer=True)
    shares = parse_policy(calibration.policy).beta  # type: ignore[attr-defined]
    counts = [math.floor(share * 16 + 1e-9) for share in shares]
    assert [count / 16 for count in counts] == list(shares)
    assert calibration.neighbor is not None
    assert calibration.achieved.value >= 0.8 > calibration.neighbor.estimate.value
    assert calibration.is_monotonic
    total = sum(counts)
    splits = [(m, total - m) for m in range(max(1, total - 16), min(16, total - 1) + 1)]
    policies = [f"des-vote:beta={a / 16}/{b / 16}" for a, b in splits]
    best = max(measured.value for measured in tiny.measure_on_trace("mass", policies))
    assert calibration.achieved.value == pytest.approx(best)


def test_family_without_budgets_per_layer_raises(tiny: PolicyEvaluator):
    with pytest.raises(CoterieError, match=r"no budget for each layer; .*: des-vote"):
        calibrate(tiny, "racing", "mass=0.8", per_layer=True)


@pytest.mark.usefixtures("embedded_once")
@pytest.mark.parametrize("target", ["drop=0.1", pytest.param("experts=38", marks=pytest.mark.slow)])
def test_targets_are_met_on_the_embedded_model(target: str):
    prompts = prompts_from_tasks(["words", "algebra"], 1, TaskOptions("llada2", seed=3))
    evaluator = PolicyEvaluator(coterie.load(), prompts, batch_size=12)
    family = "des-seq" if target == "drop=0.1" else "uniform-vote"
    calibration = calibrate(evaluator, family, target)
    assert Target.parse(target).is_met(calibration.achieved)
    neighbor = calibration.neighbor
    assert neighbor is None or not Target.parse(target).is_met(neighbor.estimate)
    assert calibration.achieved.n == len(calibration.vanilla.correct) == 2
    experts, vanilla = (run.experts_estimate() for run in (calibration.run, calibration.vanilla))
    assert experts.value < vanilla.value
