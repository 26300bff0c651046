"""The latency of the MoE layer (Eq. 2) by tokens and experts, and its roofline (Fig. 1b)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from coterie.lab import timing
from coterie.lab.bench.routings import BLOCK_LENGTH, balanced_routing
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.plotting import (
    Series,
    SeriesStyle,
    guide_series,
    indexed_style,
    line_chart,
    policy_series,
    timing_series,
)
from coterie.lab.study.experiment import Entry, Experiment, Finding, Part, StudyContext
from coterie.lab.study.layers import (
    INPUTS_PER_WIDTH,
    BenchLayer,
    RunTimer,
    TimedRun,
    fit_points,
    layer_names,
    machine_values,
    measure_layers,
    rotate_inputs,
    routed_blocks,
)

TOKEN_COUNTS = (8, 16, 32, 64)
EXPERT_COUNTS = (8, 12, 19, 25, 38, 51, 64, 84, 112, 128, 163, 200, 256)  # unique experts timed
ROUNDS = {False: 40, True: 8}  # of the model's own small layers, of a large random layer
VANILLA, CORESET = "vanilla", "des-vote:beta=0.15"
POLICIES = (VANILLA, "des-seq:k=3", "des-vote:beta=0.3", CORESET)
MIN_R2 = 0.95  # least R^2 at which Equation 2 holds
LINE_ALPHAS = (1.0, 1.0, 0.55, 1.0)  # distinguish the two sizes of DES-Vote
ROOF_ROUNDS = {False: 30, True: 6}  # of the model's own small layers, of a large random layer
MIN_READING_SHARE = 2 / 3  # of the time: below it, memory does not bound the layer


@dataclass(frozen=True)
class LatencyExperiment(Experiment, name="latency"):
    """Layers timed in turns over a grid of tokens and experts, and a plane fitted to the times.

    Each entry of ``lines`` in the record is a layer: ``bench``, ``points`` of the grid, their
    ``fit``, its bandwidth ``read`` (1/b in bytes per second; null where b is not positive), and
    ``checks``, blocks routed by a policy with the seconds that the fit ``predicted``.
    """

    shapes: Sequence[LayerShape] = PAPER_LAYERS
    pace: timing.TimingBudget = timing.FULL_BUDGET

    def measure(self, context: StudyContext) -> Entry:
        layers, machine = measure_layers(
            context, self.shapes, _measure_layer, budget=self.pace, rounds=ROUNDS
        )
        return {**machine, "lines": layers}

    def report(self, record: Entry) -> Iterator[Part]:
        bandwidth = record["limits"]["bytes_per_second"]
        layers = [_with_units(layer) for layer in record["lines"]]
        for number, layer in enumerate(layers):
            draw = partial(_draw, layer)
            yield self.text.drawing("figure", draw, f"{self.name}-{number}", **layer)
        yield self.text.table("fit", layers, **machine_values(record))
        with_checks = [layer for layer in layers if layer["checks"]]
        yield from (self.text.table("checks", one["checks"], **one) for one in with_checks)
        yield from (self.text.finding("linear", layer["is_linear"], **layer) for layer in layers)
        yield from (self._reading_finding(layer, bandwidth) for layer in with_checks)
        yield from record["skipped"]
        yield from timing.load_warnings(record["machine"])

    def _reading_finding(self, layer: Entry, bandwidth: float) -> Finding:
        vanilla = next(check for check in layer["checks"] if check["policy"] == VANILLA)
        share, rate = layer["fit"]["b"] * vanilla["used"] / vanilla["predicted"], ""
        if (read := layer["read"]) is not None:
            key = "rate_from_caches" if read > bandwidth else "rate"
            rate = self.text.sentence(key, share=read / bandwidth, **layer)
        values = {**layer, "vanilla": vanilla, "share": share, "rate": rate}
        return self.text.finding("reading", share >= 0.5, **values)


def _measure_layer(
    context: StudyContext, bench: BenchLayer, limits: timing.DeviceLimits, time_runs: RunTimer
) -> Entry:
    """Time a layer over a grid of tokens and experts, and fit Equation 2."""
    del limits
    draw, k = torch.Generator().manual_seed(0), bench.shape.router.k
    grid = {
        (tokens, used): _balanced_run(bench, tokens, used, draw)
        for tokens in TOKEN_COUNTS
        for used in sorted({k, *EXPERT_COUNTS, bench.shape.router.experts})
        if k <= used <= min(tokens * k, bench.shape.router.experts)
    }
    blocks = routed_blocks(context, bench, BLOCK_LENGTH, POLICIES)
    timed = time_runs({**grid, **blocks})
    points = [{"tokens": tokens, **timed[tokens, used]} for tokens, used in grid]
    fit = fit_points(points)
    predicted = {name: timing.predict_seconds(fit, b.used, b.pairs) for name, b in blocks.items()}
    checks = [{"policy": p, **timed[p], "predicted": seconds} for p, seconds in predicted.items()]
    read = bench.expert_bytes / fit["b"] if fit["b"] > 0 else None
    facts = {"bench": bench.to_record(), "points": points, "fit": fit}
    return {**facts, "read": read, "checks": checks}


def _balanced_run(bench: BenchLayer, tokens: int, used: int, draw: torch.Generator) -> TimedRun:
    """Tokens that use exactly ``used`` experts, each of them equally often."""
    routings = [
        balanced_routing(bench.shape.router, tokens, used, draw, bench.device)
        for _ in range(max(INPUTS_PER_WIDTH, len(bench.slabs)))
    ]
    run = rotate_inputs(bench, [bench.inputs(tokens, draw) for _ in routings], routings)
    return TimedRun(run, used, tokens * bench.shape.router.k)


def _with_units(layer: Entry) -> dict[str, Any]:
    """A layer of the record with its names, and its numbers in the units of the texts."""
    fit, read = layer["fit"], layer["read"]
    checks = [
        {
            **check,
            "ms": check["seconds"]["median"] * 1e3,
            "predicted_ms": check["predicted"] * 1e3,
            "error": check["predicted"] / check["seconds"]["median"] - 1,
        }
        for check in layer["checks"]
    ]
    is_linear = fit["r2"] >= MIN_R2 and fit["b"] > 0
    units = {"ms": fit["t0"] * 1e3, "us": {key: fit[key] * 1e6 for key in ("a", "b")}}
    rate = f"{read / 1e9:.1f}" if read else ""
    source = "of a skewed router" if layer["bench"]["random"] else "from real decoding"
    texts = {**layer_names(layer["bench"]), "gbps": rate, "source": source, "block": BLOCK_LENGTH}
    return {**layer, **units, **texts, "checks": checks, "is_linear": is_linear}


def _draw(layer: Entry) -> Figure:
    series = []
    for index, tokens in enumerate(TOKEN_COUNTS):
        points = [point for point in layer["points"] if point["tokens"] == tokens]
        if not points:
            continue
        style, used = indexed_style(index), [point["used"] for point in points]
        timings = [point["seconds"] for point in points]
        series.append(timing_series(style, used, timings, f"{tokens} tokens", ""))
        ends, pairs = (min(used), max(used)), points[0]["pairs"]
        fit_ms = [timing.predict_seconds(layer["fit"], end, pairs) * 1e3 for end in ends]
        series.append(Series(None, ends, fit_ms, replace(style, marker=""), width=1))
    if checks := layer["checks"]:
        x, y = ([check[key] for check in checks] for key in ("used", "ms"))
        style, label = SeriesStyle("", "x", ""), f"routed blocks of {BLOCK_LENGTH}"
        series.append(Series(label, x, y, style, line=""))
    slowest = max(point["seconds"]["median"] for point in layer["points"])
    x, limit = f"unique experts of {layer['bench']['experts']}", (0, 1.25e3 * slowest)
    return line_chart(series, x, "milliseconds", xlim=(0, None), ylim=limit, columns=3)


@dataclass(frozen=True)
class RooflineExperiment(Experiment, name="roofline"):
    """Bytes from the experts in use, operations from token-expert pairs, both roofs measured.

    Each entry of ``roofs`` in the record is a layer with its ``peak`` operations per second. Its
    ``points`` have a policy, a number of ``tokens``, means of unique experts (``used``),
    token-expert ``pairs`` and operations (``flops``), and the ``intensity`` in operations per byte.
    """

    shapes: Sequence[LayerShape] = PAPER_LAYERS
    pace: timing.TimingBudget = timing.FULL_BUDGET

    def measure(self, context: StudyContext) -> Entry:
        layers, machine = measure_layers(
            context, self.shapes, _measure_roof, budget=self.pace, rounds=ROOF_ROUNDS
        )
        return {**machine, "roofs": layers}

    def report(self, record: Entry) -> Iterator[Part]:
        limits, at_block = record["limits"], []
        for number, layer in enumerate(record["roofs"]):
            tokens = ", ".join(map(str, sorted({point["tokens"] for point in layer["points"]})))
            values = {"tokens": tokens, **layer_names(layer["bench"])}
            draw = partial(_draw_roof, layer, limits)
            yield self.text.drawing("figure", draw, f"{self.name}-{number}", **values)
            points = rated_points(layer, limits)
            at_block += [point for point in points if point["tokens"] == BLOCK_LENGTH]
            yield from self._findings(layer, points, limits)
        peaks = sorted(limits["flops_per_second"].items())
        rates = ", ".join(f"{peak / 1e9:.0f} in {dtype}" for dtype, peak in peaks)
        machine = machine_values(record)
        yield self.text.table("points", at_block, block=BLOCK_LENGTH, peaks=rates, **machine)
        yield from record["skipped"]
        yield from timing.load_warnings(record["machine"])

    def _findings(
        self, layer: Entry, points: Sequence[Entry], limits: timing.DeviceLimits
    ) -> list[Finding]:
        at_block = {point["policy"]: point for point in points if point["tokens"] == BLOCK_LENGTH}
        if VANILLA not in at_block:
            return []
        vanilla, coreset = at_block[VANILLA], at_block[CORESET]
        ridge, reading = layer["peak"] / limits["bytes_per_second"], reading_share(points, vanilla)
        is_read = reading >= MIN_READING_SHARE
        values = {
            "block": BLOCK_LENGTH,
            "vanilla": vanilla,
            "coreset": coreset,
            "ridge": ridge,
            "reading": reading,
            "overhead": "" if is_read else self.text.sentence("overhead"),
            "speedup": coreset["gflops"] / vanilla["gflops"],
        }
        faster = coreset["seconds"]["high"] < vanilla["seconds"]["low"]
        return [
            self.text.finding("bound", vanilla["intensity"] < ridge and is_read, **values),
            self.text.finding("coreset", faster, **values),
        ]


def _measure_roof(
    context: StudyContext, bench: BenchLayer, limits: timing.DeviceLimits, time_runs: RunTimer
) -> Entry:
    """Route blocks of every size under every policy, time the experts, count operations."""
    runs = {
        (policy, tokens): run
        for tokens in (1, *TOKEN_COUNTS)
        for policy, run in routed_blocks(context, bench, tokens, POLICIES).items()
    }
    points = [
        {
            "policy": policy,
            "tokens": tokens,
            **point,
            "intensity": bench.flops(point["pairs"]) / (point["used"] * bench.expert_bytes),
            "flops": bench.flops(point["pairs"]),
        }
        for (policy, tokens), point in time_runs(runs).items()
    ]
    peak = limits["flops_per_second"][timing.dtype_name(bench.dtype)]
    return {"bench": bench.to_record(), "peak": peak, "points": points}


def attainable_flops(intensity: float, peak: float, bytes_per_second: float) -> float:
    """Operations per second under the roof."""
    return min(peak, intensity * bytes_per_second)


def rated_points(layer: Entry, limits: timing.DeviceLimits) -> list[Entry]:
    """A layer's points with the bytes read and the rate: as measured, and as share of the roof."""
    rated, names = [], layer_names(layer["bench"])
    for point in layer["points"]:
        seconds = point["seconds"]["median"]
        rate = point["flops"] / seconds
        roof = attainable_flops(point["intensity"], layer["peak"], limits["bytes_per_second"])
        megabytes = point["used"] * layer["bench"]["expert_bytes"] / 1e6
        values = {"ms": seconds * 1e3, "gflops": rate / 1e9, "attained": rate / roof}
        rated.append({**point, **names, **values, "megabytes": megabytes})
    return rated


def reading_share(points: Sequence[Entry], point: Entry) -> float:
    """The share of a point's time that is proportional to its unique experts.

    It comes from the fit of Equation 2 through all points of the layer.
    """
    fit = fit_points(points)
    total = timing.predict_seconds(fit, point["used"], point["pairs"])
    return min(1.0, max(0.0, fit["b"] * point["used"] / total))


def _draw_roof(layer: Entry, limits: timing.DeviceLimits) -> Figure:
    points, read, peak = rated_points(layer, limits), limits["bytes_per_second"], layer["peak"]
    intensities = [point["intensity"] for point in points]
    left, right = min(intensities) / 2, max(4 * peak / read, 2 * max(intensities))
    corners = (left, peak / read, right)
    roof = [attainable_flops(intensity, peak, read) / 1e9 for intensity in corners]
    series = [guide_series(corners, roof, line="-", width=1.2)]
    for policy, alpha in zip(POLICIES, LINE_ALPHAS, strict=True):
        own = [point for point in points if point["policy"] == policy]
        x, y = ([point[key] for point in own] for key in ("intensity", "gflops"))
        series.append(policy_series(policy, x, y, alpha=alpha))
    x, y = "operations per byte read", "billion operations per second"
    figure = line_chart(series, x, y, xlim=(left, right))
    ax = figure.axes[0]
    ax.set(xscale="log", yscale="log", xlim=(left, right))
    ax.grid(which="minor", visible=False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    options = {"xytext": (-5, 4), "textcoords": "offset points", "ha": "right", "fontsize": 8.5}
    for point in points:
        if point["policy"] == VANILLA:
            ax.annotate(f"{point['tokens']}", (point["intensity"], point["gflops"]), **options)
    return figure
