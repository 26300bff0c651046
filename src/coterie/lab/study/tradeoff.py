"""Latency of the MoE layer against accuracy (Fig. 1d)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from matplotlib.figure import Figure

from coterie.engine.observation import LayerObservation, collect_observations
from coterie.errors import TaskError
from coterie.lab import timing
from coterie.lab.bench.routings import BLOCK_LENGTH
from coterie.lab.plotting import guide_series, line_chart, pareto_front, policy_series, policy_style
from coterie.lab.study.experiment import Entry, Experiment, Finding, Part, StudyContext
from coterie.lab.study.layers import (
    FORWARDS_PER_PROMPT,
    NUM_PROMPTS,
    layer_runner,
    time_observed_layers,
)
from coterie.lab.study.results import VariantResults
from coterie.routing import parse_policy, route

# Routes as vanilla does, and computes the importance of tokens, which mc-moe needs.
OBSERVED_POLICY = "mc-moe:beta=0,protect=0"
ROUNDS = 8
INDISTINGUISHABLE_P = 0.05  # least p at which an accuracy counts as that of vanilla


@dataclass(frozen=True)
class TradeoffExperiment(Experiment, name="latency-accuracy"):
    """Accuracy from the record ``accuracy``; latency of the whole layer on the same real forwards.

    The latency includes gate, selection and experts. Large layers are predicted from their fits.
    """

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> Entry:
        accuracy = context.record("accuracy")
        if accuracy is None:
            raise TaskError("the record of `accuracy` is missing; run both experiments")
        results = VariantResults.from_record(accuracy)
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
        policies = [result.policy for result in variants]
        seconds = time_observed_layers(
            context.engine,
            observations,
            policies,
            {"layer": layer_runner},
            rounds=self.rounds,
            on_progress=lambda share: context.on_progress(share, "the layer under every policy"),
        )
        latency = context.record("latency") or {"lines": ()}
        others = [line for line in latency["lines"] if line["bench"]["random"]]
        return {
            "experts": results.experts,
            "machine": timing.timing_conditions(context.engine.model.transformer.device),
            "forwards": len(observations),
            "points": [
                {
                    "policy": result.policy,
                    "accuracy": result.accuracy,
                    "interval": list(result.interval),
                    "p": result.compare_to(results.vanilla).p_value,  # McNemar's
                    "items": result.accuracy_share().n,
                    **mean_sizes(observations, result.policy),
                    "seconds": seconds["layer", result.policy],
                }
                for result in variants
            ],
            "others": [
                {key: line["bench"][key] for key in ("name", "experts")} | {"fit": line["fit"]}
                for line in others
            ],
        }

    def report(self, record: Entry) -> Iterator[Part]:
        points = timed_points(record)
        vanilla = next(point for point in points if point["policy"] == "vanilla")
        names = vanilla["predicted"]
        label = "milliseconds of the MoE layer, measured"
        draw = partial(draw_tradeoff, points, [point["ms"] for point in points], label)
        yield self.text.drawing("measured", draw)
        for name in names:
            label = f"milliseconds of {name}'s experts, predicted"
            times = [point["predicted"][name] for point in points]
            draw = partial(draw_tradeoff, points, times, label)
            figure = f"{self.name}-{name.lower()}"
            yield self.text.drawing("predicted", draw, figure, name=name)
        rows = sorted(points, key=lambda point: -point["accuracy"])
        columns = {f"{name}, ms (predicted)": f"{{predicted[{name}]:.1f}}" for name in names}
        items, forwards = vanilla["items"], record["forwards"]
        yield self.text.table("points", rows, columns, items=items, forwards=forwards)
        others = [point for point in points if point is not vanilla]
        similar = [point for point in others if point["p"] >= INDISTINGUISHABLE_P]
        yield self._own_layer_finding(vanilla, similar)
        yield from (self._predicted_finding(name, vanilla, similar) for name in names)
        yield from timing.load_warnings(record["machine"])

    def _own_layer_finding(self, vanilla: Entry, similar: Sequence[Entry]) -> Finding:
        if not similar:
            return self.text.finding("none", False, claim="own")
        best, n = min(similar, key=lambda point: point["ms"]), len(similar)
        ratio, is_faster = vanilla["ms"] / best["ms"], best["high"] < vanilla["low"]
        return self.text.finding("own", is_faster, n=n, best=best, vanilla=vanilla, ratio=ratio)

    def _predicted_finding(self, name: str, vanilla: Entry, similar: Sequence[Entry]) -> Finding:
        best = min((vanilla, *similar), key=lambda point: point["predicted"][name])
        ms, vanilla_ms = best["predicted"][name], vanilla["predicted"][name]
        times = {"ms": ms, "vanilla_ms": vanilla_ms, "ratio": vanilla_ms / ms}
        return self.text.finding("predicted", None, name=name, best=best, **times)


def timed_points(record: Entry) -> list[Entry]:
    """The points with milliseconds: median, quartiles, and ``predicted`` by the name of a layer.

    A prediction is of another layer's experts, at the same share of experts and pairs per token.
    """
    points = []
    for point in record["points"]:
        ms, low, high = (point["seconds"][key] * 1e3 for key in ("median", "low", "high"))
        share, pairs = point["used"] / record["experts"], point["pairs"] * BLOCK_LENGTH
        predicted = {
            each["name"]: 1e3 * timing.predict_seconds(each["fit"], share * each["experts"], pairs)
            for each in record["others"]
        }
        points.append({**point, "ms": ms, "low": low, "high": high, "predicted": predicted})
    return points


def mean_sizes(observations: Sequence[LayerObservation], policy: str) -> dict[str, float]:
    """Means of unique experts (``used``) and of token-expert pairs per token (``pairs``)."""
    parsed = parse_policy(policy)
    routings = [route(replace(o.scores, vanilla_ids=None), parsed) for o in observations]
    used = fmean(float(routing.used.sum()) for routing in routings)
    pairs = fmean(float((r.topk_ids >= 0).sum(-1).double().mean()) for r in routings)
    return {"used": used, "pairs": pairs}


def draw_tradeoff(points: Sequence[Entry], times: Sequence[float], label: str) -> Figure:
    """Accuracy against milliseconds, one marker per policy, with the Pareto front."""
    series = [
        policy_series(
            point["policy"], [ms], [point["accuracy"]],
            label=policy_style(point["policy"]).name, line="", intervals=[point["interval"]],
        )
        for point, ms in zip(points, times, strict=True)
    ]  # fmt: skip
    pairs = zip(times, (point["accuracy"] for point in points), strict=True)
    xs, ys = zip(*pareto_front(pairs, lambda pair: pair), strict=True)
    front = guide_series(xs, ys, line="-", width=0.8, steps=True)
    return line_chart(
        [front, *series], label, "accuracy",
        xlim=(0, None), ylim=(-0.02, 1.04), percent="y", columns=3, height=4.2,
    )  # fmt: skip
