"""Latency of the MoE layer against accuracy (Fig. 1d)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from matplotlib.figure import Figure

from coterie.engine.observation import LayerObservation, collect_observations
from coterie.lab.bench import timing
from coterie.lab.bench.routings import BLOCK_LENGTH
from coterie.lab.plotting import policy_style
from coterie.lab.study.charts import (
    Series,
    guide_series,
    line_chart,
    milliseconds,
    pareto_front,
    quartiles_text,
)
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Entry,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    judge,
)
from coterie.lab.study.layers import FORWARDS_PER_PROMPT, NUM_PROMPTS, layer_runner, moe_layers
from coterie.lab.study.results import JsonObject, VariantResults
from coterie.routing import parse_policy, route

VANILLA = "vanilla"
# Routes as vanilla does, and computes the importance of tokens, which mc-moe needs.
OBSERVED_POLICY = "mc-moe:beta=0,protect=0"
ROUNDS = 8
INDISTINGUISHABLE_P = 0.05  # least p at which an accuracy counts as that of vanilla


@dataclass(frozen=True)
class TradeoffExperiment(Experiment):
    """Accuracy from the record ``accuracy``; latency of the whole layer on the same real forwards.

    The latency includes gate, selection and experts. Large layers are predicted from their fits.
    """

    text = ExperimentText.load("latency-accuracy")

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> JsonObject:
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
        policies = [result.policy for result in variants]
        seconds = time_policies(context, observations, policies, rounds=self.rounds)
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
                    "seconds": seconds[result.policy],
                }
                for result in variants
            ],
            "others": [
                {key: line["bench"][key] for key in ("name", "experts")} | {"fit": line["fit"]}
                for line in others
            ],
        }

    def drawings(self, record: Entry) -> Sequence[Drawing]:
        measured = [point["seconds"]["median"] for point in record["points"]]
        label = "milliseconds of the MoE layer, measured"
        draw = partial(draw_tradeoff, record, measured, label)
        drawings = [Drawing(self.name, self.text.caption("measured"), draw)]
        for layer in record["others"]:
            name, seconds = layer["name"], list(predicted_seconds(record, layer).values())
            label = f"milliseconds of {name}'s experts, predicted"
            draw = partial(draw_tradeoff, record, seconds, label)
            caption = self.text.caption("predicted", name=name)
            drawings.append(Drawing(f"{self.name}-{name.lower()}", caption, draw))
        return drawings

    def tables(self, record: Entry) -> Sequence[Table]:
        def prediction(layer: Entry) -> Callable[[Entry], str]:
            seconds = predicted_seconds(record, layer)
            return lambda point: f"{seconds[point['policy']] * 1e3:.1f}"

        points = sorted(record["points"], key=lambda point: -point["accuracy"])
        columns = {
            "layer, ms": lambda point: milliseconds(point["seconds"], 3),
            "quartiles": lambda point: quartiles_text(point["seconds"], 3),
            **{f"{each['name']}, ms (predicted)": prediction(each) for each in record["others"]},
        }
        items, forwards = points[0]["items"], record["forwards"]
        return [self.text.table("points", points, columns, items=items, forwards=forwards)]

    def findings(self, record: Entry) -> Sequence[Finding | str]:
        return [
            self._own_layer_finding(record),
            *(self._predicted_finding(record, layer) for layer in record["others"]),
            *timing.load_warnings(record["machine"]),
        ]

    def _own_layer_finding(self, record: Entry) -> Finding:
        vanilla, *similar = vanilla_and_similar(record)
        if not similar:
            return judge(self.text.sentence("none"), self.text.claim("own"), False)
        best = min(similar, key=lambda point: point["seconds"]["median"])
        is_faster = best["seconds"]["high"] < vanilla["seconds"]["low"]
        ms, vanilla_ms = (milliseconds(point["seconds"], 3) for point in (best, vanilla))
        ratio = vanilla["seconds"]["median"] / best["seconds"]["median"]
        values = {"n": len(similar), "best": best, "best_ms": ms, "ratio": ratio}
        return self.text.finding("own", is_faster, vanilla=vanilla, vanilla_ms=vanilla_ms, **values)

    def _predicted_finding(self, record: Entry, layer: Entry) -> Finding:
        milliseconds = {p: s * 1e3 for p, s in predicted_seconds(record, layer).items()}
        policies = [point["policy"] for point in vanilla_and_similar(record)]
        best = min(policies, key=lambda policy: milliseconds[policy])
        ms, vanilla_ms = milliseconds[best], milliseconds[VANILLA]
        values = {"name": layer["name"], "best": best, "best_ms": ms, "vanilla_ms": vanilla_ms}
        return self.text.finding("predicted", None, ratio=vanilla_ms / ms, **values)


def time_policies(
    context: StudyContext,
    observations: Sequence[LayerObservation],
    policies: Sequence[str],
    *,
    rounds: int,
) -> dict[str, timing.TimingStats]:
    """Time the whole layer on every observation under every policy, in turns."""
    transformer = context.engine.model.transformer
    moes = {moe.layer: moe for moe in moe_layers(transformer)}
    runs = {
        (policy, index): layer_runner(moes[observed.layer], observed, parse_policy(policy))
        for policy in policies
        for index, observed in enumerate(observations)
    }
    timings = timing.time_interleaved(
        runs,
        rounds,
        device=transformer.device,
        on_progress=lambda share: context.on_progress(share, "the layer under every policy"),
    )
    indices = range(len(observations))
    return {p: timing.mean_timing_stats([timings[p, i] for i in indices]) for p in policies}


def mean_sizes(observations: Sequence[LayerObservation], policy: str) -> dict[str, float]:
    """Means of unique experts (``used``) and of token-expert pairs per token (``pairs``)."""
    parsed = parse_policy(policy)
    routings = [route(replace(o.scores, vanilla_ids=None), parsed) for o in observations]
    used = fmean(float(routing.used.sum()) for routing in routings)
    pairs = fmean(float((r.topk_ids >= 0).sum(-1).double().mean()) for r in routings)
    return {"used": used, "pairs": pairs}


def predicted_seconds(record: Entry, layer: Entry) -> dict[str, float]:
    """Policy -> seconds of another layer's experts, at the same share of experts and pairs."""
    scale = layer["experts"] / record["experts"]
    return {
        point["policy"]: timing.predict_seconds(
            layer["fit"], point["used"] * scale, point["pairs"] * BLOCK_LENGTH
        )
        for point in record["points"]
    }


def vanilla_and_similar(record: Entry) -> list[Entry]:
    """Vanilla, then the other policies without a significant difference in accuracy."""
    vanilla = next(point for point in record["points"] if point["policy"] == VANILLA)
    others = [point for point in record["points"] if point is not vanilla]
    return [vanilla, *(point for point in others if point["p"] >= INDISTINGUISHABLE_P)]


def draw_tradeoff(record: Entry, seconds: Sequence[float], label: str) -> Figure:
    """Accuracy against time, one marker per policy, with the Pareto front."""
    series, points = [], []
    for point, one in zip(record["points"], seconds, strict=True):
        style, x, y = policy_style(point["policy"]), one * 1e3, point["accuracy"]
        points.append((x, y))
        series.append(Series(style.name, [x], [y], style, "", [point["interval"]]))
    xs, ys = zip(*pareto_front(points, lambda point: point), strict=True)
    front = guide_series(xs, ys, line="-", width=0.8, steps=True)
    return line_chart(
        [front, *series], label, "accuracy",
        xlim=(0, None), ylim=(-0.02, 1.04), percent="y", columns=3, height=4.2,
    )  # fmt: skip
