"""The chapters that watch single forwards: laws of what is measured, and drawings from records."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law, spellings
from scipy import stats
from tiny_models import family_generation, tiny_model
from tiny_study import drawings_of, findings_of, tables_of
from tiny_task import make_prompts

import coterie
from coterie.engine.engine import Engine
from coterie.engine.observation import LayerObservation, collect_observations, moe_output
from coterie.errors import CoterieError
from coterie.lab.evals.stats import mean_interval, ranks, spearman
from coterie.lab.plotting import render_svg
from coterie.lab.study import reconstruction
from coterie.lab.study.experiment import Experiment, Finding, StudyContext
from coterie.lab.study.fidelity import (
    MAX_FORWARDS,
    METRICS,
    FidelitySums,
    answer_mask,
    compare_policies,
    compare_to_curve,
    content_mask,
    fidelity_scores,
    gaps_to_curve,
    kl_divergence,
    measure_layer,
    observe_vanilla,
    prompts_at_block_start,
    relative_squared_error,
    run_first_forward,
    sample_layers,
)
from coterie.lab.study.importance import (
    AblateExpert,
    ImportanceExperiment,
    ablate_layer,
    importance_coverage,
)
from coterie.lab.study.maps import (
    POSITION_KINDS,
    HitRateCounter,
    MapsExperiment,
    expert_activation,
    position_kinds,
)
from coterie.lab.study.reconstruction import ReconstructionExperiment
from coterie.routing import POLICIES, parse_policy, route
from coterie.telemetry import ExpertCounter
from coterie.testing import FAMILY_CONFIGS, write_checkpoint

FAMILIES = tuple(FAMILY_CONFIGS)
PROMPTS = ("5 17 33 2 9", "7 7 1", "40 41 42 43 44 45 46 60 61")
CHAPTERS = (
    ReconstructionExperiment(),
    ImportanceExperiment(),
    MapsExperiment(),
)
WATCHABLE = tuple(name for name in POLICIES if name != "mc-moe")
SIZES = st.integers(1, 60).map(float)
FLOATS = st.floats(-5, 5).map(lambda value: round(value, 2))


@cache
def engine(family: str = "llada2") -> Engine:
    generation = family_generation(family).replace(max_new_tokens=8)
    return Engine(tiny_model(family), generation=generation)


def lab(family: str = "llada2", shares: list[float] | None = None) -> StudyContext:
    heard: list[float] = [] if shares is None else shares
    return StudyContext(
        engine=engine(family),
        tasks=[make_prompts("asking", PROMPTS)],
        folder=Path("nowhere"),
        num_problems=3,
        num_prompts=3,
        on_progress=lambda share, doing: heard.append(share),
    )


@cache
def watched(family: str = "llada2") -> tuple[LayerObservation, ...]:
    return tuple(collect_observations(engine(family), PROMPTS))


@cache
def facts(chapter: Experiment, family: str = "llada2") -> tuple[str, tuple[float, ...]]:
    """Its record of two prompts, and how far it said it was."""
    shares: list[float] = []
    few = replace(lab(family, shares), num_prompts=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstruction, "SHARES", reconstruction.SHARES[::4])
        patch.setattr(reconstruction, "MAIN_SHARES", reconstruction.MAIN_SHARES[1:3])
        measured = chapter.measure(few)
    return json.dumps(measured, allow_nan=False), tuple(shares)


def ratios(
    seen: LayerObservation, spelling: str, family: str = "llada2"
) -> dict[str, torch.Tensor]:
    """Numerators and denominators [S, 2] of one policy on one look, words being every position."""
    routing = route(seen.scores, parse_policy(spelling))
    plain, other = (moe_output(engine(family).model, seen, r) for r in (seen.routing, routing))
    everywhere = torch.ones(seen.x.shape[:2], dtype=torch.bool)
    sums = measure_layer(seen, routing, other, plain, everywhere)
    return dict(zip(METRICS, sums.unbind(1), strict=True))


def by_hand(spelling: str, seen: LayerObservation, family: str = "llada2") -> list[float]:
    """|y - y_vanilla|^2 / |y_vanilla|^2 of each row, in numpy."""
    routing = route(seen.scores, parse_policy(spelling))
    plain, other = (
        moe_output(engine(family).model, seen, r).double().numpy() for r in (seen.routing, routing)
    )
    return [float(((b - a) ** 2).sum() / (a**2).sum()) for a, b in zip(plain, other, strict=True)]


@law(20)
@given(family=st.sampled_from(FAMILIES), look=st.integers(0, 5))
def test_full_coreset_has_no_loss(family: str, look: int) -> None:
    k = engine(family).model.spec.router.k
    for spelling in ("vanilla", "des-vote:beta=1.0", f"des-seq:k={k}", "random:beta=1.0"):
        sums = ratios(watched(family)[look], spelling, family)
        for kept in ("recall", "word_recall", "mass"):
            assert torch.equal(*sums[kept].unbind(-1))
        for loss in ("loss", "word_loss", "open_loss"):
            assert not sums[loss][:, 0].any()


@law(40)
@given(spelling=spellings(WATCHABLE), family=st.sampled_from(FAMILIES))
def test_metrics_equal_telemetry(spelling: str, family: str) -> None:
    counting, sums = ExpertCounter(), torch.zeros(len(METRICS), 2, dtype=torch.float64)
    for seen in watched(family)[:6]:
        routing = route(seen.scores, parse_policy(spelling))
        counting.on_forward(("all",) * len(seen.rows))
        counting.on_routed(seen.layer, seen.scores, routing)
        plain, other = (moe_output(engine(family).model, seen, r) for r in (seen.routing, routing))
        everywhere = torch.ones(seen.x.shape[:2], dtype=torch.bool)
        sums += measure_layer(seen, routing, other, plain, everywhere).sum(0)
    (reading,) = fidelity_scores(FidelitySums((spelling,), sums[None, None]))
    counts = counting.counts("all")
    assert reading["recall"] == pytest.approx(counts.hit_rate)
    assert reading["experts"] == pytest.approx(counts.mean)
    assert reading["mass"] == pytest.approx(counts.vote_mass_kept)


@law(20)
@given(spelling=spellings(WATCHABLE), look=st.integers(0, 5))
def test_loss_is_the_relative_squared_error(spelling: str, look: int) -> None:
    seen = watched()[look]
    loss = ratios(seen, spelling)["loss"]
    assert loss[:, 0].tolist() == pytest.approx(by_hand(spelling, seen))
    assert loss[:, 1].tolist() == [1.0] * len(seen.rows)


def test_answer_mask_includes_the_end_of_text() -> None:
    results, (seen, *_) = observe_vanilla(lab(), lambda _: None), watched()
    here = answer_mask([replace(result, new_tokens=2) for result in results], seen)
    for row, start in enumerate(seen.starts):
        expected = [0 <= start + n <= 2 for n in range(seen.x.shape[1])]
        assert here[row].tolist() == expected


def test_policies_are_compared_by_prompt() -> None:
    shares: list[float] = []
    tally = compare_policies(lab(), ["vanilla", "des-vote:beta=0.25"], shares.append)
    looks = tally.sums[..., METRICS.index("loss"), 1]
    assert torch.equal(looks[0], looks[1])
    seen = collect_observations(engine(), PROMPTS, max_forwards=MAX_FORWARDS)
    assert tally.num_observations == sum(len(each.rows) for each in seen)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    full, part = fidelity_scores(tally)
    assert (full["recall"], full["loss"]) == (1.0, 0.0)
    assert part["loss"] > 0
    assert part["experts"] == pytest.approx(4, abs=0.2)
    low, high = part["loss_interval"]
    assert low <= part["loss"] <= high


def test_mc_moe_is_refused() -> None:
    with pytest.raises(CoterieError, match="mc-moe"):
        compare_policies(lab(), ["mc-moe:beta=0.5"], lambda _: None)


def tally_of(points: Sequence[tuple[float, float]], prompts: int = 5) -> FidelitySums:
    """A policy per (experts, loss), the same for every prompt."""
    sums = torch.ones(len(points), prompts, len(METRICS), 2, dtype=torch.float64)
    for place, (size, loss) in enumerate(points):
        sums[place, :, METRICS.index("experts"), 0] = size
        sums[place, :, METRICS.index("loss"), 0] = loss
    return FidelitySums(tuple(map(str, range(len(points)))), sums)


def test_gap_to_curve_at_equal_size() -> None:
    tally = tally_of([(10, 0.4), (20, 0.2), (15, 0.1), (40, 0.0)])
    on, below = gaps_to_curve(tally, ["0", "2", "3"], ["1", "0"], "loss")
    assert (on["policy"], on["gap"]) == ("0", 0.0)
    assert (below["policy"], below["experts"]) == ("2", 15.0)  # "3" lies beyond the curve
    assert below["curve"] == pytest.approx(0.3)
    assert below["gap"] == pytest.approx(-0.2)
    assert below["interval"] == pytest.approx([-0.2, -0.2])
    assert [compare_to_curve(below, figure) for figure in ("loss", "recall")] == [1, -1]
    assert compare_to_curve(on, "loss") == 0


@law(20)
@given(
    curve=st.lists(st.tuples(SIZES, SIZES), min_size=2, max_size=5, unique_by=lambda p: p[0]),
    size=SIZES,
    loss=SIZES,
)
def test_curves_are_linear_between_points(
    curve: list[tuple[float, float]], size: float, loss: float
) -> None:
    tally = tally_of([(size, loss), *curve])
    gaps = gaps_to_curve(tally, ["0"], tally.policies[1:], "loss")
    ends, heights = zip(*sorted(curve), strict=True)
    assert len(gaps) == (ends[0] <= size <= ends[-1])
    for gap in gaps:
        assert gap["gap"] == pytest.approx(loss - np.interp(size, ends, heights), abs=1e-9)


def test_bootstrap_draws_all_prompts() -> None:
    samples = tally_of([(1, 1)], prompts=7).samples
    assert np.array_equal(samples, np.full(samples.shape, 7.0))
    sums = torch.arange(7.0, dtype=torch.float64).view(1, 7, 1, 1)
    total, *draws = FidelitySums(("a",), sums).samples.flatten()
    assert total == 21
    assert np.mean(draws) == pytest.approx(21, rel=0.05)
    assert np.std(draws) == pytest.approx(math.sqrt(7 * 4), rel=0.1)  # n times the variance


def test_sampled_layers_include_first_and_last() -> None:
    assert sample_layers(lab(), 2) == (1, 2)
    assert sample_layers(lab(), 9) == (1, 2)


@law(60)
@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    assert ranks(first).tolist() == stats.rankdata(first).tolist()
    if len(set(first)) > 1 and len(set(second)) > 1:
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    else:
        assert spearman(first, second) == 0.0


def test_mean_interval_contains_the_mean() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    low, high = mean_interval(values)
    assert low < sum(values) / 5 < high
    assert mean_interval([0.3] * 4) == pytest.approx([0.3, 0.3])


def test_divergence_equals_torch() -> None:
    first, second = torch.randn(2, 3, 4, 11, generator=torch.Generator().manual_seed(0)).unbind()
    p, q = (x.double().log_softmax(-1) for x in (first, second))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(first, second), expected)
    assert kl_divergence(first[:1], first[:1].expand(2, -1, -1)).abs().max() == 0
    assert relative_squared_error(first, first).tolist() == [0.0] * 3
    assert relative_squared_error(first, 2 * first).tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_block_is_all_answer(family: str) -> None:
    host = engine(family)
    for prompt, ids in zip(PROMPTS, prompts_at_block_start(host, PROMPTS), strict=True):
        assert list(ids[: len(prompt.split())]) == [int(token) for token in prompt.split()]
        opened = run_first_forward(host, ids, "vanilla")
        assert opened.logits.shape[1] == 8
        _, scores, _ = opened.trace.routings[0]
        assert scores.progress is not None
        assert scores.progress.masked is not None
        masked = scores.progress.masked[0, opened.block]
        # Where a first forward of everything has written already, some are not masked any more.
        assert int(masked.sum()) == 8 or family == "llada-moe"


def test_first_forward_of_a_quantised_model(tmp_path: Path) -> None:
    """In bf16 its head is packed where kernels are, and has no rows to multiply by."""
    folder = write_checkpoint(tmp_path, "llada2", seed=3)
    wide, narrow = (coterie.load(folder, block=8, dtype=dtype) for dtype in ("fp32", "bf16"))
    one, other = (run_first_forward(host, [5, 17, 33], "vanilla").logits for host in (wide, narrow))
    assert other.dtype == torch.float32
    assert float((one - other).norm() / one.norm()) < 0.1


def test_content_mask_ends_at_the_first_end_of_text() -> None:
    ids = torch.tensor([[3, 94, 5, 94], [1, 2, 3, 4], [94, 1, 1, 1]])
    expected = [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert content_mask(engine(), ids).tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_ablating_an_unused_expert_changes_nothing(family: str) -> None:
    host = engine(family)
    (ids, *_) = prompts_at_block_start(host, PROMPTS[:1])
    plain = run_first_forward(host, ids, "vanilla")
    layer, _, routing = plain.trace.routings[0]
    idle = (~routing.used).nonzero()[:, 0].tolist()
    assert idle, "the tiny model uses every expert: nothing is tested"
    other = run_first_forward(host, ids, AblateExpert(layer, tuple(idle)), rows=len(idle))
    whole = plain.logits.expand(len(idle), -1, -1)
    torch.testing.assert_close(other.logits, whole, rtol=1e-5, atol=5e-5)
    assert kl_divergence(plain.logits, other.logits).max() < 1e-9


def test_ablated_expert_is_not_used_in_its_layer() -> None:
    host = engine()
    (ids, *_) = prompts_at_block_start(host, PROMPTS[:1])
    plain = run_first_forward(host, ids, "vanilla")
    layer, _, routing = plain.trace.routings[0]
    (gone, *_) = routing.used.nonzero()[:, 0].tolist()
    other = run_first_forward(host, ids, AblateExpert(layer, (gone, -1)), rows=2)
    at, _, after = other.trace.routings[0]
    without, whole = after.topk_ids.view(2, -1).tolist()
    assert at == layer
    assert gone not in without
    assert gone in whole
    assert min(without) >= 0  # its tokens take their next best
    assert torch.equal(after.topk_ids.view(2, 8, -1)[1], routing.topk_ids.view(8, -1))
    assert kl_divergence(plain.logits, other.logits)[0].max() > 1e-9
    torch.testing.assert_close(other.logits[1], plain.logits[0])


def test_only_experts_in_use_have_importance() -> None:
    host = engine()
    (ids, *_) = prompts_at_block_start(host, PROMPTS[:1])
    taken = ablate_layer(host, ids, 1)
    for importance in taken.importances.values():
        assert np.array_equal(importance > 0, taken.used)
    whole = importance_coverage([[taken]], "des-vote:beta=1.0")
    part = importance_coverage([[taken]], "des-vote:beta=0.25")
    assert (whole["share"], whole["best"]) == pytest.approx((1.0, 1.0))
    assert 0 < part["share"] <= part["best"] < 1
    assert part["experts"] == 4


def test_vanilla_hit_rates_are_one() -> None:
    hits = HitRateCounter(("vanilla",), (1, 2))
    for seen in watched():
        hits.on_layer(seen)
    record = hits.to_record()
    (found,) = record["maps"]
    assert [len(row) for row in found["positions"]] == [8, 8]
    for rows in (found["positions"], found["steps"]):
        rates = [rate for row in rows for rate in row]
        assert rates == pytest.approx([1.0] * len(rates))
    assert sum(record["share"].values()) == pytest.approx(1.0)


def test_hit_rates_are_means_over_tokens() -> None:
    """By position in one layer, counted with sets; and the kinds weigh up to the same mean."""
    spelling, rates = "des-vote:beta=0.25", [[] for _ in range(8)]
    hits = HitRateCounter((spelling,), (1,))
    for seen in watched():
        if seen.layer == 1:
            hits.on_layer(seen)
            routing = route(seen.scores, parse_policy(spelling))
            for n, (own, used) in enumerate(
                zip(routing.vanilla_ids, routing.topk_ids, strict=True)
            ):
                shared = set(own.tolist()) & set(used.tolist())
                rates[n % seen.x.shape[1]].append(len(shared) / len(own))
    record = hits.to_record()
    (found,) = record["maps"]
    assert found["positions"] == [pytest.approx([np.mean(rate) for rate in rates])]
    assert 0 < min(found["positions"][0]) < 1
    weighed = sum(share * found["kinds"][kind] for kind, share in record["share"].items())
    assert weighed == pytest.approx(np.mean(rates))


def test_activation_is_sorted() -> None:
    routings = [seen.routing for seen in watched() if seen.layer == 1]
    activation = expert_activation(1, routings, 16)
    choices = activation["choices"]
    assert len(choices) == len(activation["weight"]) == 16
    assert sum(choices) == pytest.approx(1)
    assert sum(activation["weight"]) == pytest.approx(1)
    assert choices == sorted(choices, reverse=True)
    assert activation["effective"] == pytest.approx(math.exp(stats.entropy(choices)))


def test_kinds_of_positions() -> None:
    names = set()
    for seen in watched():
        progress = seen.scores.progress
        assert progress is not None
        assert progress.masked is not None
        assert progress.after_eos is not None
        kinds = position_kinds(seen)
        assert torch.equal(kinds == POSITION_KINDS.index("masked"), progress.masked)
        assert torch.equal(
            kinds == POSITION_KINDS.index("fill"), progress.after_eos & ~progress.masked
        )
        names.update(POSITION_KINDS[kind] for kind in kinds.flatten().tolist())
    assert {"masked", "written"} <= names


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_experiment_writes_from_its_record(chapter: Experiment) -> None:
    kept = json.loads(facts(chapter)[0])
    drawings = drawings_of(chapter, kept)
    assert len({drawing.name for drawing in drawings}) == len(drawings) > 1
    assert all(drawing.caption for drawing in drawings)
    assert render_svg(drawings[0].draw, name="a", scheme="dark").startswith("<svg")
    for table in tables_of(chapter, kept):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.heads)}
        assert max(table.numbers) < len(table.heads)
    for finding in findings_of(chapter, kept):
        text = finding.text if isinstance(finding, Finding) else finding
        assert text.endswith(".")
        assert "nan" not in text


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_every_figure_renders_in_both_schemes(chapter: Experiment) -> None:
    for drawing in drawings_of(chapter, json.loads(facts(chapter)[0])):
        light, dark = (
            render_svg(drawing.draw, name=drawing.name, scheme=s) for s in ("light", "dark")
        )
        assert light.startswith("<svg")
        assert light != dark


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_experiment_reports_progress(chapter: Experiment) -> None:
    _, shares = facts(chapter)
    assert list(shares) == sorted(shares)
    assert shares[0] >= 0
    assert 0.5 < shares[-1] <= 1


def test_bidirectional_model() -> None:
    for chapter in (ImportanceExperiment(), MapsExperiment()):
        kept = json.loads(facts(chapter, "llada-moe")[0])
        assert findings_of(chapter, kept)
        assert drawings_of(chapter, kept)
