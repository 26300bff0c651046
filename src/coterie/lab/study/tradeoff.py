"""Latency of the MoE layer against accuracy (Fig. 1d)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, cast

from matplotlib.figure import Figure

from coterie.engine.observation import LayerObservation, collect_observations
from coterie.errors import CoterieError
from coterie.lab.bench.routings import BLOCK_LENGTH
from coterie.lab.bench.timing import (
    LatencyFit,
    TimingConditions,
    TimingStats,
    load_warnings,
    mean_timing_stats,
    predict_seconds,
    time_interleaved,
    timing_conditions,
)
from coterie.lab.plotting import add_legend, foreground, format_percent, new_axes, policy_style
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.latency import LayerLatency
from coterie.lab.study.layers import layer_runner, moe_layers
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.routings import FORWARDS_PER_PROMPT, NUM_PROMPTS
from coterie.routing import parse_policy, route

VANILLA = "vanilla"
# Routes as vanilla does, but has the importance of tokens worked out, which mc-moe asks for.
OBSERVED_POLICY = "mc-moe:beta=0,protect=0"
ROUNDS = 8
INDISTINGUISHABLE_P = 0.05  # p from which an accuracy cannot be told from vanilla's


class TradeoffPoint(TypedDict):
    """One policy. ``used`` and ``pairs`` were counted on the forwards that were timed; a pair is
    one token's use of one expert. ``p``: McNemar's, against vanilla on the same items."""

    policy: str
    accuracy: float
    interval: list[float]
    p: float
    items: int
    used: float
    pairs: float  # for each token
    seconds: TimingStats


class PredictedLayer(TypedDict):
    """A layer of another shape, whose latency is predicted: its name, experts and fit."""

    name: str
    experts: int
    fit: LatencyFit


class TradeoffRecord(TypedDict):
    experts: int
    machine: TimingConditions
    forwards: int
    points: list[TradeoffPoint]
    others: list[PredictedLayer]


@dataclass(frozen=True)
class TradeoffExperiment:
    """Accuracy from the accuracy chapter; latency of the whole layer (gate, selection, experts) on
    the same real forwards for all policies. Large layers are predicted, and said to be."""

    name: str = "latency-accuracy"
    title: str = "Latency of the MoE layer against accuracy (Fig. 1d)"
    question: str = "Which policies make the layers of experts faster, and what do they cost?"

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> ExperimentData:
        data = context.record("accuracy")
        if data is None:
            raise CoterieError("needs the record of the chapter accuracy: ask for both")
        results = VariantResults.from_data(data)
        variant_results = [
            t for t in results.by_name.values() if t.generation == results.vanilla.generation
        ]
        context.on_progress(0.0, "forwards to time")
        observations = collect_observations(
            context.engine,
            context.questions()[:NUM_PROMPTS],
            policy=OBSERVED_POLICY,
            batch_size=1,
            max_forwards=FORWARDS_PER_PROMPT,
        )
        points = time_policies(
            context, observations, variant_results, results.vanilla, rounds=self.rounds
        )
        latency = context.record("latency")
        layers = cast("list[LayerLatency]", latency["lines"]) if latency is not None else []
        predicted_layers = [
            PredictedLayer(
                name=layer["bench"]["name"], experts=layer["bench"]["experts"], fit=layer["fit"]
            )
            for layer in layers
            if layer["bench"]["random"]
        ]
        tradeoff = TradeoffRecord(
            experts=results.experts,
            machine=timing_conditions(context.engine.model.transformer.device),
            forwards=len(observations),
            points=points,
            others=predicted_layers,
        )
        return cast("ExperimentData", tradeoff)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("TradeoffRecord", data)
        measured_drawing = Drawing(
            self.name,
            "Accuracy with its 95 % interval against the measured time of the model's own MoE "
            "layer. The line joins the policies that no other beats in both.",
            lambda: _draw(
                record, _measured_seconds(record), "milliseconds of the MoE layer, measured"
            ),
        )
        return [
            measured_drawing,
            *(self._predicted_drawing(record, layer) for layer in record["others"]),
        ]

    def _predicted_drawing(self, record: TradeoffRecord, layer: PredictedLayer) -> Drawing:
        return Drawing(
            f"{self.name}-{layer['name'].lower()}",
            "The same accuracy (of the small model) against the time of the experts of a layer of "
            f"{layer['name']}'s shape, predicted by the fit of Equation 2 for the same share of "
            "its experts; the selection is not in it.",
            lambda: _draw(
                record,
                [predicted_seconds(point, record, layer) for point in record["points"]],
                f"milliseconds of {layer['name']}'s experts, predicted",
            ),
        )

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("TradeoffRecord", data)
        layers = record["others"]
        rows = [
            [
                point["policy"],
                f"{point['accuracy']:.1%}",
                f"{point['interval'][0]:.1%} to {point['interval'][1]:.1%}",
                f"{point['used']:.1f}",
                f"{point['seconds']['median'] * 1e3:.3f}",
                f"{point['seconds']['low'] * 1e3:.3f} to {point['seconds']['high'] * 1e3:.3f}",
                *(f"{predicted_seconds(point, record, layer) * 1e3:.1f}" for layer in layers),
            ]
            for point in sorted(record["points"], key=lambda point: -point["accuracy"])
        ]
        heads = ["policy", "right", "95 %", "experts", "layer, ms", "quartiles"]
        heads += [f"{layer['name']}, ms (predicted)" for layer in layers]
        return [
            Table(
                heads=heads,
                rows=rows,
                caption=f"{record['points'][0]['items']} items; the layer was timed on "
                f"{record['forwards']} real inputs of layers, the same for all policies.",
                numbers=list(range(1, len(heads))),
            )
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("TradeoffRecord", data)
        predicted_findings = [_predicted_finding(record, layer) for layer in record["others"]]
        return [_own_layer_finding(record), *predicted_findings, *load_warnings(record["machine"])]


def time_policies(
    context: StudyContext,
    observations: Sequence[LayerObservation],
    variant_results: Sequence[VariantResult],
    vanilla: VariantResult,
    *,
    rounds: int,
) -> list[TradeoffPoint]:
    """The whole layer of every watched input under every policy, in turns."""
    moes = {moe.layer: moe for moe in moe_layers(context.engine.model.transformer)}
    runs: dict[tuple[str, int], Callable[[], object]] = {
        (result.policy, index): layer_runner(
            moes[observation.layer], observation, parse_policy(result.policy)
        )
        for result in variant_results
        for index, observation in enumerate(observations)
    }
    timings = time_interleaved(
        runs,
        rounds,
        device=context.engine.model.transformer.device,
        on_progress=lambda share: context.on_progress(share, "the layer under every policy"),
    )
    points = []
    for result in variant_results:
        share, (used, pairs) = result.accuracy_share(), mean_sizes(observations, result.policy)
        points.append(
            TradeoffPoint(
                policy=result.policy,
                accuracy=share.value,
                interval=list(share.interval),
                p=result.compare_to(vanilla).p_value,
                items=share.n,
                used=used,
                pairs=pairs,
                seconds=mean_timing_stats(
                    [timings[result.policy, index] for index in range(len(observations))]
                ),
            )
        )
    return points


def mean_sizes(observations: Sequence[LayerObservation], policy: str) -> tuple[float, float]:
    """Mean unique experts, and mean experts of a token."""
    parsed = parse_policy(policy)
    routings = [
        route(replace(observation.scores, vanilla_ids=None), parsed) for observation in observations
    ]
    used = sum(float(routing.used.sum()) for routing in routings) / len(routings)
    pairs = sum(float((routing.topk_ids >= 0).sum(-1).double().mean()) for routing in routings)
    return used, pairs / len(routings)


def predicted_seconds(point: TradeoffPoint, record: TradeoffRecord, layer: PredictedLayer) -> float:
    """Seconds of another layer's experts, at the same share of experts and use of them."""
    experts = point["used"] / record["experts"] * layer["experts"]
    return predict_seconds(layer["fit"], experts, point["pairs"] * BLOCK_LENGTH)


def pareto_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, gain): those that nothing beats in both, by rising cost."""
    best: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or gain > best[-1][1]:
            best.append((cost, gain))
    return best


def _measured_seconds(record: TradeoffRecord) -> list[float]:
    return [point["seconds"]["median"] for point in record["points"]]


def _draw(record: TradeoffRecord, seconds: Sequence[float], label: str) -> Figure:
    figure, ax = new_axes(label, "right answers", height=4.2)
    coordinates = [(s * 1e3, p["accuracy"]) for s, p in zip(seconds, record["points"], strict=True)]
    best = pareto_points(coordinates)
    ax.plot(*zip(*best, strict=True), color=foreground(), linewidth=0.8, drawstyle="steps-post")
    for (x, y), point in zip(coordinates, record["points"], strict=True):
        low, high = point["interval"]
        ax.errorbar(
            x,
            y,
            yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
            color=policy_style(point["policy"]).colour,
            marker=policy_style(point["policy"]).marker,
            linestyle="",
            elinewidth=0.8,
            label=policy_style(point["policy"]).name,
        )
    ax.set(ylim=(-0.02, 1.04), xlim=(0, None))
    format_percent(ax)
    add_legend(ax, columns=3)
    return figure


def _as_accurate(record: TradeoffRecord) -> list[TradeoffPoint]:
    """Policies whose accuracy cannot be told from vanilla's."""
    others = [point for point in record["points"] if point["policy"] != VANILLA]
    return [point for point in others if point["p"] >= INDISTINGUISHABLE_P]


def _vanilla_point(record: TradeoffRecord) -> TradeoffPoint:
    return next(point for point in record["points"] if point["policy"] == VANILLA)


def _own_layer_finding(record: TradeoffRecord) -> Finding:
    vanilla, accurate = _vanilla_point(record), _as_accurate(record)
    claim = "A coreset lowers the latency of the MoE layer at next to no cost in accuracy."
    if not accurate:
        return Finding("No policy is as right as vanilla.", claim, "does not hold")
    best = min(accurate, key=lambda point: point["seconds"]["median"])
    ratio = vanilla["seconds"]["median"] / best["seconds"]["median"]
    faster = best["seconds"]["high"] < vanilla["seconds"]["low"]
    return Finding(
        f"Of {len(accurate)} policies whose accuracy cannot be told from vanilla's, {best['policy']} "
        f"runs the model's own layer fastest: {best['seconds']['median'] * 1e3:.3f} ms against "
        f"{vanilla['seconds']['median'] * 1e3:.3f}, {ratio:.2f} times as fast, with "
        f"{best['used']:.0f} experts in place of {vanilla['used']:.0f}.",
        claim=claim,
        verdict="holds" if faster else "does not hold",
    )


def _predicted_finding(record: TradeoffRecord, layer: PredictedLayer) -> Finding:
    candidates = [_vanilla_point(record), *_as_accurate(record)]
    best = min(candidates, key=lambda point: predicted_seconds(point, record, layer))
    vanilla_seconds, best_seconds = (
        predicted_seconds(point, record, layer) for point in (candidates[0], best)
    )
    return Finding(
        f"In a layer of {layer['name']}'s shape the same share of experts would take "
        f"{best_seconds * 1e3:.0f} ms under {best['policy']} and {vanilla_seconds * 1e3:.0f} under vanilla, "
        f"{vanilla_seconds / best_seconds:.2f} times as fast. That is predicted by the fit, with the accuracy of "
        "the small model.",
        claim="The same, in a large model.",
        verdict="cannot be told here",
    )
