"""Chapters about time and bytes: they count right, fit what they should, draw from facts alone.

No test here asserts how long anything took.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_study import drawings_of, findings_of, tables_of
from tiny_task import make_prompts

import coterie
from coterie.engine.engine import Engine
from coterie.engine.observation import collect_observations, moe_output
from coterie.errors import CoterieError
from coterie.lab.bench import routings
from coterie.lab.bench.profiler import OTHER, PARTS, Stopwatch, timed_model
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.plotting import ColourScheme, pareto_front, render_svg
from coterie.lab.records import make_record
from coterie.lab.study import latency, layers, selection
from coterie.lab.study.breakdown import BreakdownExperiment
from coterie.lab.study.experiment import Experiment, Finding, StudyContext
from coterie.lab.study.explosion import (
    ExplosionExperiment,
    bin_by_masked,
    expected_uniform,
    summarize_block_size,
)
from coterie.lab.study.latency import LatencyExperiment, RooflineExperiment
from coterie.lab.study.layers import FORWARDS_PER_PROMPT, model_bench_layer
from coterie.lab.study.results import VariantResult
from coterie.lab.study.selection import VERSIONS, SelectionExperiment
from coterie.lab.study.study import EXPERIMENTS
from coterie.lab.study.tradeoff import OBSERVED_POLICY, TradeoffExperiment
from coterie.lab.timing import TimingBudget
from coterie.routing import parse_policy, route
from coterie.testing import write_checkpoint
from coterie.values import RouterSpec

CPU = torch.device("cpu")
ROUTER = RouterSpec(experts=64, k=3, activation="softmax", renormalise=True)
SMALL = LayerShape("Small", ROUTER, hidden=32, width=16, unique_experts=40)
QUICK = TimingBudget(rounds=1, read_bytes=1 << 12, matrix_size=8)
QUESTIONS = ("3 5 7 11", "2 4 6 8 10 12", "1 9 9 1", "5 5 5 5 5 5 5 5 5")
positive = st.floats(1e-6, 1e-2)


@dataclass
class ProgressLog:
    shares: list[float] = field(default_factory=list)

    def __call__(self, share: float, doing: str) -> None:
        assert doing
        self.shares.append(share)


def tiny(folder: Path, longest: int = 512) -> Engine:
    """A random model that looks twice at each block."""
    where = write_checkpoint(folder / "model", "llada2", max_position_embeddings=longest)
    return coterie.load(where, max_new_tokens=20, unmask="fixed:steps=2", device="cpu")


def lab(
    folder: Path, engine: Engine | None = None, told: ProgressLog | None = None
) -> StudyContext:
    return StudyContext(
        engine=engine or tiny(folder),
        tasks=[make_prompts("numbers", QUESTIONS)],
        folder=folder,
        num_problems=4,
        num_prompts=3,
        on_progress=told or ProgressLog(),
    )


def leave(folder: Path, chapter: str, facts: dict[str, object]) -> None:
    """A record such as another chapter leaves."""
    (folder / "records").mkdir(exist_ok=True)
    record = make_record(chapter, [], [], facts=facts)
    content = json.dumps(record, allow_nan=False)
    (folder / "records" / f"{chapter}.json").write_text(content, encoding="utf-8")


def accuracy(experts: int) -> dict[str, object]:
    """A record of the accuracy chapter in which fewer experts are right less often."""
    marks = {
        "vanilla": "1111111111",
        "des-seq:k=2": "1111111110",
        "des-vote:beta=0.3": "1110000000",
        "mc-moe:beta=0.4,protect=0.02": "1111110000",
    }
    tallies = [
        VariantResult(policy, policy, {}, {"numbers": right}, 9.0, 1.0, 1.0, 1.0, 4.0, 1.0, 0)
        for policy, right in marks.items()
    ]
    arms = [tally.to_json(tallies[0]) for tally in tallies]
    return {"experts": experts, "k": 4, "block": 32, "arms": arms, "groups": {}, "pairs": []}


# Layers that are timed


def test_layer_without_memory_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layers, "free_memory", lambda _device: layers.MEMORY_MARGIN)
    said = layers.random_bench_layer(PAPER_LAYERS[0], CPU)
    assert isinstance(said, str)
    assert "LLaDA2.0-mini's shape is not measured: it needs 1.5 GiB" in said


def test_timed_layer_equals_the_model_layer(tmp_path: Path) -> None:
    engine = tiny(tmp_path)
    moes = {moe.layer: moe for moe in layers.moe_layers(engine.model.transformer)}
    for watched in collect_observations(
        engine, list(QUESTIONS), batch_size=1, policy=OBSERVED_POLICY
    ):
        for spelling in ("vanilla", "des-vote:beta=0.4", "mc-moe:beta=0.5,protect=0.1"):
            policy = parse_policy(spelling)
            routing = route(replace(watched.scores, vanilla_ids=None), policy)
            expected = moe_output(engine.model, watched, routing)
            with torch.inference_mode():
                found = layers.layer_runner(moes[watched.layer], watched, policy)()
            assert torch.equal(found, expected)


def test_observed_policy_routes_as_vanilla(tmp_path: Path) -> None:
    engine = tiny(tmp_path)
    plain = collect_observations(engine, list(QUESTIONS), batch_size=1)
    weighed = collect_observations(engine, list(QUESTIONS), batch_size=1, policy=OBSERVED_POLICY)
    assert len(plain) == len(weighed)
    for one, other in zip(plain, weighed, strict=True):
        assert torch.equal(one.routing.topk_ids, other.routing.topk_ids)
        assert torch.equal(one.routing.topk_weights, other.routing.topk_weights)


# The explosion


@given(experts=st.integers(1, 512), share=st.floats(0, 1), tokens=st.integers(1, 200))
def test_uniform_routing_is_bounded(experts: int, share: float, tokens: int) -> None:
    k = max(1, round(share * experts))
    assert expected_uniform(experts, k, 1) == pytest.approx(k)
    assert (
        k - 1e-6
        <= expected_uniform(experts, k, tokens)
        <= expected_uniform(experts, k, tokens + 1) + 1e-9
    )
    assert expected_uniform(experts, k, tokens) <= experts


def test_uniform_routing_equals_the_paper() -> None:
    assert round(expected_uniform(256, 8, 32)) == 163
    assert round(expected_uniform(64, 8, 32)) == 63


def test_block_size_summary() -> None:
    seen = torch.tensor([[4.0, 8.0, 6.0], [2.0, 4.0, 12.0]])
    found = summarize_block_size(16, seen)  # means over layers: 3, 6, 9
    assert (found["mean"], found["low"], found["high"]) == (6.0, 4.5, 7.5)
    assert (found["forwards"], found["layers"]) == (3, [6.0, 6.0])


def test_forwards_are_binned_by_masked_positions() -> None:
    masked, mean = torch.tensor([32, 31, 4, 1]), torch.tensor([10.0, 20.0, 30.0, 50.0])
    assert bin_by_masked(masked, mean, 32) == [
        {"masked": 2.5, "forwards": 2, "mean": 40.0},
        {"masked": 31.5, "forwards": 2, "mean": 15.0},
    ]


def test_expert_counts_equal_the_engine(tmp_path: Path) -> None:
    engine = tiny(tmp_path)
    facts = ExplosionExperiment(blocks=(8, 32)).measure(lab(tmp_path, engine))
    curves = {curve["policy"]: curve for curve in facts["curves"]}  # type: ignore[attr-defined]
    for policy, curve in curves.items():
        for there in curve["points"]:
            told = [
                engine.generate(question, policy=policy, block=there["block"]).experts
                for question in QUESTIONS[:3]
            ]
            forwards = [each.forwards for each in told]
            whole = sum(each.mean * n for each, n in zip(told, forwards, strict=True))
            assert there["forwards"] == sum(forwards)
            assert there["mean"] == pytest.approx(whole / sum(forwards))
    assert [p["block"] for p in curves["vanilla"]["points"]] == [8, 32]
    for policy in ("des-vote:beta=0.3", "des-vote:beta=0.15"):
        coreset = curves[policy]["budget"]
        assert coreset == int(float(policy[-4:].strip("=")) * 16)
        assert all(there["high"] <= coreset for there in curves[policy]["points"])


def test_block_size_that_does_not_fit_is_skipped(tmp_path: Path) -> None:
    engine = tiny(tmp_path, longest=60)
    found = ExplosionExperiment(blocks=(8, 64))
    facts = found.measure(lab(tmp_path, engine))
    told = [each for each in findings_of(found, facts) if isinstance(each, str)]
    assert [each.split(" are not")[0] for each in told] == ["Blocks of 64"]
    assert "the model has 60" in told[0]


# The roofline


@given(peak=st.floats(1, 1e12), read=st.floats(1, 1e12), at=st.floats(1e-3, 1e3))
def test_attainable_rate_is_below_both_roofs(peak: float, read: float, at: float) -> None:
    best = latency.attainable_flops(at, peak, read)
    assert best == min(peak, at * read)


def test_roofline_counts(tmp_path: Path) -> None:
    chapter = RooflineExperiment(shapes=(SMALL,), pace=QUICK)
    facts = chapter.measure(lab(tmp_path))
    own, small = facts["roofs"]  # type: ignore[misc]
    assert own["bench"]["expert_bytes"] == 3 * 32 * 16 * 4
    assert small["bench"]["expert_bytes"] == 3 * 32 * 16 * 2
    for roof in (own, small):
        k, size = roof["bench"]["k"], roof["bench"]["expert_bytes"] / (3 * 32 * 16)
        plain = [each for each in roof["points"] if each["policy"] == "vanilla"]
        assert [each["tokens"] for each in plain] == [1, *latency.TOKEN_COUNTS]
        for each in plain:
            pairs = each["tokens"] * k
            assert each["flops"] == 6 * 32 * 16 * pairs
            assert each["intensity"] == pytest.approx(2 * pairs / (each["used"] * size))
        assert plain[0]["used"] == k


@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_quantised_layer_is_timed_with_model_dtype(tmp_path: Path, experts: str) -> None:
    tiny(tmp_path)
    engine = coterie.load(
        tmp_path / "model",
        max_new_tokens=20,
        unmask="fixed:steps=2",
        device="cpu",
        expert_dtype=experts,
    )
    bench = model_bench_layer(engine)
    assert bench.inputs(3, torch.Generator().manual_seed(0)).dtype == torch.float32
    facts = RooflineExperiment(shapes=(), pace=QUICK).measure(lab(tmp_path, engine))
    [own] = facts["roofs"]  # type: ignore[misc]
    assert own["bench"]["expert_bytes"] == bench.expert_bytes < 3 * 32 * 16 * 4
    assert own["peak"] == facts["limits"]["flops_per_second"]["float32"]  # type: ignore[index]


@given(fixed=positive, each=positive, pair=positive)
def test_reading_share_is_the_expert_term(fixed: float, each: float, pair: float) -> None:
    points = [
        {"used": used, "pairs": pairs, "seconds": {"median": fixed + each * used + pair * pairs}}
        for used, pairs in ((8.0, 8.0), (80.0, 256.0), (38.0, 256.0), (100.0, 512.0))
    ]
    share = each * 80 / (fixed + each * 80 + pair * 256)
    assert latency.reading_share(points, points[1]) == pytest.approx(share, rel=1e-3, abs=1e-6)


# Parts of a forward


def test_stopwatch_times_are_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 3.5, 7.5, 8.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    watch = Stopwatch(CPU)
    with watch("outer"):
        with watch("inner"):
            pass
        with watch("inner"):
            pass
    assert watch.laps == {"outer": 1.0 + 0.5 + 1.0, "inner": 2.0 + 4.0}


@pytest.mark.parametrize("policy", ["vanilla", "des-vote:beta=0.3", "des-seq:k=2"])
def test_timed_model_equals_the_model(tmp_path: Path, policy: str) -> None:
    engine = tiny(tmp_path)
    watch = Stopwatch(CPU)
    wrapped = Engine(timed_model(engine.model, watch), generation=engine.generation)
    for question in QUESTIONS:
        with watch(OTHER):
            found = wrapped.generate(question, policy=policy)
        expected = engine.generate(question, policy=policy)
        assert found.tokens == expected.tokens
        assert found.experts == expected.experts
    assert set(watch.laps) == set(PARTS)


def test_parts_add_up_to_the_forward(tmp_path: Path) -> None:
    facts = BreakdownExperiment(rounds=1).measure(lab(tmp_path))
    for each in facts["policies"]:  # type: ignore[attr-defined]
        assert sum(each["shares"].values()) == pytest.approx(1.0)
        assert set(each["parts"]) == set(PARTS)


# The selection


def test_selection_versions_agree() -> None:
    router = selection.scale_router(RouterSpec(16, 4, "sigmoid", True, groups=4, topk_groups=2), 64)
    assert (router.groups, router.topk_groups, router.experts) == (4, 2, 64)
    scores = routings.skewed_scores(router, 16, 1.0, torch.Generator().manual_seed(3))
    for select in VERSIONS.values():
        for spelling in ("vanilla", "des-seq:k=2", "des-vote:beta=0.2", "xshare:beta=0.3"):
            policy = parse_policy(spelling)
            found, expected = select(scores, policy), route(scores, policy)
            assert torch.equal(found.topk_ids, expected.topk_ids)
            torch.testing.assert_close(found.topk_weights, expected.topk_weights, rtol=1e-6, atol=0)


def test_indivisible_groups_are_dropped() -> None:
    router = selection.scale_router(RouterSpec(18, 4, "sigmoid", True, groups=6, topk_groups=2), 64)
    assert (router.groups, router.topk_groups) == (1, 1)


# Latency against accuracy

places = st.lists(st.tuples(st.floats(0, 9), st.floats(0, 1)), min_size=1, max_size=30)


@given(points=places)
def test_pareto_front(points: list[tuple[float, float]]) -> None:
    best = pareto_front(points, lambda point: point)
    assert set(best) <= set(points)
    for cost, gain in points:
        assert any(c <= cost and g >= gain for c, g in best)
    assert best == sorted(best)
    assert [gain for _, gain in best] == sorted({gain for _, gain in best})


def test_tradeoff_times_every_policy(tmp_path: Path) -> None:
    here = lab(tmp_path)
    leave(tmp_path, "accuracy", accuracy(16))
    facts = TradeoffExperiment(rounds=1).measure(here)
    found = {point["policy"]: point for point in facts["points"]}  # type: ignore[attr-defined]
    asked = here.questions()
    seen = collect_observations(here.engine, asked, batch_size=1, max_forwards=FORWARDS_PER_PROMPT)
    used = [float(watched.routing.used.sum()) for watched in seen]
    assert found["vanilla"]["used"] == pytest.approx(sum(used) / len(used))
    assert found["vanilla"]["pairs"] == found["des-seq:k=2"]["pairs"] == 4
    assert found["mc-moe:beta=0.4,protect=0.02"]["pairs"] < 4
    assert found["des-vote:beta=0.3"]["used"] <= 4
    assert found["des-vote:beta=0.3"]["accuracy"] == 0.3


def test_tradeoff_needs_the_accuracy_record(tmp_path: Path) -> None:
    with pytest.raises(CoterieError, match=r"accuracy.*missing"):
        TradeoffExperiment().measure(lab(tmp_path))


# All chapters


def chapters() -> list[Experiment]:
    """Latency comes before what reads its record."""
    return [
        ExplosionExperiment(blocks=(8, 16)),
        RooflineExperiment(shapes=(SMALL,), pace=QUICK),
        BreakdownExperiment(rounds=1),
        LatencyExperiment(shapes=(SMALL,), pace=QUICK),
        SelectionExperiment(rounds=1),
        TradeoffExperiment(rounds=1),
    ]


@pytest.mark.parametrize(
    ("schemes", "figures"),
    [(("light",), 1), pytest.param(("light", "dark"), 13, marks=pytest.mark.slow)],
)
def test_timing_experiments_render_from_records(
    tmp_path: Path, schemes: Sequence[ColourScheme], figures: int
) -> None:
    """By default one figure of each experiment, in one scheme."""
    progress = ProgressLog()
    context = lab(tmp_path, told=progress)
    leave(tmp_path, "accuracy", accuracy(16))
    for experiment in chapters():
        progress.shares.clear()
        leave(tmp_path, experiment.name, experiment.measure(context))
        assert progress.shares
        assert progress.shares == sorted(progress.shares)
        assert all(0 <= share <= 1 for share in progress.shares)
    del context
    names: list[str] = []
    for experiment in chapters():
        path = tmp_path / "records" / f"{experiment.name}.json"
        record = json.loads(path.read_text(encoding="utf-8"))["facts"]
        drawings = drawings_of(experiment, record)
        names += [drawing.name for drawing in drawings]
        for drawing in drawings[:figures]:
            svgs = [render_svg(drawing.draw, name=drawing.name, scheme=s) for s in schemes]
            assert all("<svg" in svg for svg in svgs)
            assert len(set(svgs)) == len(schemes)
        for table in tables_of(experiment, record):
            assert table.rows
            assert {len(row) for row in table.rows} == {len(table.heads)}
        findings = findings_of(experiment, record)
        assert findings
        judged = [finding for finding in findings if isinstance(finding, Finding)]
        assert all(finding.verdict is not None for finding in judged if finding.claim)
    assert len(names) == len(set(names)) == 13


def test_study_has_the_timing_experiments() -> None:
    names = {chapter.name for chapter in chapters()}
    assert names <= set(EXPERIMENTS)
    assert [EXPERIMENTS[name].name for name in names] == list(names)
