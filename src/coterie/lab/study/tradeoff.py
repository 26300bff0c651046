"""Latency of the MoE layer against accuracy (Fig. 1d)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from matplotlib.figure import Figure

from coterie.engine.observation import LayerObservation, collect_observations
from coterie.lab.bench import timing
from coterie.lab.bench.routings import BLOCK_LENGTH
from coterie.lab.plotting import add_legend, foreground, format_percent, new_axes, policy_style
from coterie.lab.study.charts import (
    Series,
    draw_series,
    milliseconds,
    pareto_front,
    quartiles_text,
)
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    judge,
    make_table,
)
from coterie.lab.study.layers import FORWARDS_PER_PROMPT, NUM_PROMPTS, layer_runner, moe_layers
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.routing import parse_policy, route

VANILLA = "vanilla"
# Routes as vanilla does, and computes the importance of tokens, which mc-moe needs.
OBSERVED_POLICY = "mc-moe:beta=0,protect=0"
ROUNDS = 8
INDISTINGUISHABLE_P = 0.05  # least p at which an accuracy counts as that of vanilla


class TradeoffPoint(TypedDict):
    """One policy. ``used`` and ``pairs`` (token-expert pairs per token) are of the timed forwards.

    ``p`` is McNemar's, against vanilla on the same items.
    """

    policy: str
    accuracy: float
    interval: list[float]
    p: float
    items: int
    used: float
    pairs: float
    seconds: timing.TimingStats


class PredictedLayer(TypedDict):
    """A layer of another shape with its latency fit, for predictions."""

    name: str
    experts: int
    fit: timing.LatencyFit


class TradeoffRecord(TypedDict):
    experts: int
    machine: timing.TimingConditions
    forwards: int
    points: list[TradeoffPoint]
    others: list[PredictedLayer]


@dataclass(frozen=True)
class TradeoffExperiment(Experiment):
    """Accuracy from the record ``accuracy``; latency of the whole layer on the same real forwards.

    The latency includes gate, selection and experts. Large layers are predicted from their fits.
    """

    text = ExperimentText.load("latency-accuracy")

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> TradeoffRecord:
        results = VariantResults.from_record(context.needed_record("accuracy"))
        generation = results.vanilla.generation
        variants = [r for r in results.by_name.values() if r.generation == generation]
        context.on_progress(0.0, "forwards to time")
        observations = collect_observations(
            context.engine,
            context.questions()[:NUM_PROMPTS],
            policy=OBSERVED_POLICY,
            batch_size=1,
            max_forwards=FORWARDS_PER_PROMPT,
        )
        points = time_policies(context, observations, variants, results.vanilla, rounds=self.rounds)
        latency = context.record("latency")
        return TradeoffRecord(
            experts=results.experts,
            machine=timing.timing_conditions(context.engine.model.transformer.device),
            forwards=len(observations),
            points=points,
            others=[
                PredictedLayer(
                    name=layer["bench"]["name"], experts=layer["bench"]["experts"], fit=layer["fit"]
                )
                for layer in (latency["lines"] if latency is not None else ())
                if layer["bench"]["random"]
            ],
        )

    def drawings(self, record: TradeoffRecord) -> Sequence[Drawing]:
        measured = [point["seconds"]["median"] for point in record["points"]]

        def predicted_drawing(layer: PredictedLayer) -> Drawing:
            seconds = [predicted_seconds(point, record, layer) for point in record["points"]]
            label = f"milliseconds of {layer['name']}'s experts, predicted"
            return Drawing(
                f"{self.name}-{layer['name'].lower()}",
                "The same accuracy (of the small model) against the time of the experts of a layer "
                f"of {layer['name']}'s shape, predicted by the fit of Equation 2 for the same "
                "share of its experts. The time of the selection is not included.",
                lambda: _draw(record, seconds, label),
            )

        return [
            Drawing(
                self.name,
                "Accuracy with its 95 % interval against the measured time of the model's own MoE "
                "layer. The line is the Pareto front.",
                lambda: _draw(record, measured, "milliseconds of the MoE layer, measured"),
            ),
            *map(predicted_drawing, record["others"]),
        ]

    def tables(self, record: TradeoffRecord) -> Sequence[Table]:
        def prediction(layer: PredictedLayer) -> Callable[[TradeoffPoint], str]:
            return lambda point: f"{predicted_seconds(point, record, layer) * 1e3:.1f}"

        others = {
            f"{layer['name']}, ms (predicted)": prediction(layer) for layer in record["others"]
        }
        return [
            make_table(
                f"{record['points'][0]['items']} items; the layer was timed on "
                f"{record['forwards']} real inputs, the same for all policies.",
                sorted(record["points"], key=lambda point: -point["accuracy"]),
                {
                    "policy": "{policy}",
                    "accuracy": "{accuracy:.1%}",
                    "95 %": "{interval[0]:.1%} to {interval[1]:.1%}",
                    "experts": "{used:.1f}",
                    "layer, ms": lambda point: milliseconds(point["seconds"], 3),
                    "quartiles": lambda point: quartiles_text(point["seconds"], 3),
                    **others,
                },
            )
        ]

    def findings(self, record: TradeoffRecord) -> Sequence[Finding | str]:
        return [
            _own_layer_finding(record),
            *(_predicted_finding(record, layer) for layer in record["others"]),
            *timing.load_warnings(record["machine"]),
        ]


def time_policies(
    context: StudyContext,
    observations: Sequence[LayerObservation],
    results: Sequence[VariantResult],
    vanilla: VariantResult,
    *,
    rounds: int,
) -> list[TradeoffPoint]:
    """Time the whole layer on every observation under every policy, in turns."""
    transformer, indices = context.engine.model.transformer, range(len(observations))
    moes = {moe.layer: moe for moe in moe_layers(transformer)}
    runs = {
        (result.policy, index): layer_runner(
            moes[observation.layer], observation, parse_policy(result.policy)
        )
        for result in results
        for index, observation in enumerate(observations)
    }
    timings = timing.time_interleaved(
        runs,
        rounds,
        device=transformer.device,
        on_progress=lambda share: context.on_progress(share, "the layer under every policy"),
    )
    points = []
    for result in results:
        used, pairs = mean_sizes(observations, result.policy)
        points.append(
            TradeoffPoint(
                policy=result.policy,
                accuracy=result.accuracy,
                interval=list(result.interval),
                p=result.compare_to(vanilla).p_value,
                items=result.accuracy_share().n,
                used=used,
                pairs=pairs,
                seconds=timing.mean_timing_stats([timings[result.policy, i] for i in indices]),
            )
        )
    return points


def mean_sizes(observations: Sequence[LayerObservation], policy: str) -> tuple[float, float]:
    """Mean unique experts, and mean experts per token."""
    parsed = parse_policy(policy)
    routings = [route(replace(o.scores, vanilla_ids=None), parsed) for o in observations]
    used = sum(float(routing.used.sum()) for routing in routings) / len(routings)
    pairs = sum(float((routing.topk_ids >= 0).sum(-1).double().mean()) for routing in routings)
    return used, pairs / len(routings)


def predicted_seconds(point: TradeoffPoint, record: TradeoffRecord, layer: PredictedLayer) -> float:
    """Seconds of another layer's experts, at the same share of experts and pairs per token."""
    experts = point["used"] / record["experts"] * layer["experts"]
    return timing.predict_seconds(layer["fit"], experts, point["pairs"] * BLOCK_LENGTH)


def _draw(record: TradeoffRecord, seconds: Sequence[float], label: str) -> Figure:
    figure, ax = new_axes(label, "accuracy", height=4.2)
    points = [
        (s * 1e3, point["accuracy"]) for s, point in zip(seconds, record["points"], strict=True)
    ]
    front = pareto_front(points, lambda point: point)
    ax.plot(*zip(*front, strict=True), color=foreground(), linewidth=0.8, drawstyle="steps-post")
    for (x, y), point in zip(points, record["points"], strict=True):
        style = policy_style(point["policy"])
        draw_series(ax, Series(style.name, [x], [y], style, "", [point["interval"]]))
    ax.set(ylim=(-0.02, 1.04), xlim=(0, None))
    format_percent(ax)
    add_legend(ax, columns=3)
    return figure


def _vanilla_and_similar(record: TradeoffRecord) -> tuple[TradeoffPoint, list[TradeoffPoint]]:
    """Vanilla, and the other policies without a significant difference in accuracy."""
    vanilla = next(point for point in record["points"] if point["policy"] == VANILLA)
    others = [point for point in record["points"] if point["policy"] != VANILLA]
    return vanilla, [point for point in others if point["p"] >= INDISTINGUISHABLE_P]


def _own_layer_finding(record: TradeoffRecord) -> Finding:
    vanilla, similar = _vanilla_and_similar(record)
    claim = "A coreset lowers the latency of the MoE layer at nearly no cost in accuracy."
    if not similar:
        return judge("No policy is as accurate as vanilla.", claim, False)
    best = min(similar, key=lambda point: point["seconds"]["median"])
    ratio = vanilla["seconds"]["median"] / best["seconds"]["median"]
    return judge(
        f"Of the {len(similar)} policies without a significant difference to vanilla's accuracy, "
        f"{best['policy']} runs the model's own layer fastest: {milliseconds(best['seconds'], 3)} "
        f"ms against {milliseconds(vanilla['seconds'], 3)}, {ratio:.2f} times as fast, with "
        f"{best['used']:.0f} experts instead of {vanilla['used']:.0f}.",
        claim,
        best["seconds"]["high"] < vanilla["seconds"]["low"],
    )


def _predicted_finding(record: TradeoffRecord, layer: PredictedLayer) -> Finding:
    vanilla, similar = _vanilla_and_similar(record)
    seconds = {p["policy"]: predicted_seconds(p, record, layer) for p in (vanilla, *similar)}
    best = min(seconds, key=lambda policy: seconds[policy])
    return judge(
        f"In a layer of {layer['name']}'s shape, the same share of experts would take "
        f"{seconds[best] * 1e3:.0f} ms under {best} and {seconds[VANILLA] * 1e3:.0f} under "
        f"vanilla, {seconds[VANILLA] / seconds[best]:.2f} times as fast. This is predicted from "
        "the fit, with the accuracy of the small model.",
        "A coreset lowers the latency of a large model's MoE layer at nearly no cost in accuracy.",
        None,
    )
