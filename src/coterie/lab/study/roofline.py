"""The roofline of the MoE layer (Fig. 1b): operations per byte of experts read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from coterie.lab import timing
from coterie.lab.bench.routings import BLOCK_LENGTH
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.study.charts import guide_series, line_chart, policy_series
from coterie.lab.study.experiment import Drawing, Entry, Experiment, Finding, StudyContext, Table
from coterie.lab.study.layers import (
    BenchLayer,
    RunTimer,
    fit_points,
    layer_names,
    machine_values,
    measure_layers,
    routed_blocks,
)

TOKEN_COUNTS = (1, 8, 16, 32, 64)
VANILLA, CORESET = "vanilla", "des-vote:beta=0.15"
POLICIES = (VANILLA, "des-seq:k=3", "des-vote:beta=0.3", CORESET)
LINE_ALPHAS = (1.0, 1.0, 0.55, 1.0)  # distinguish the two sizes of DES-Vote
ROUNDS = {False: 30, True: 6}  # of the model's own small layers, of a large random layer
MIN_READING_SHARE = 2 / 3  # of the time: below it, memory does not bound the layer


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
            context, self.shapes, _measure_layer, budget=self.pace, rounds=ROUNDS
        )
        return {**machine, "roofs": layers}

    def drawings(self, record: Entry) -> Sequence[Drawing]:
        drawings = []
        for number, layer in enumerate(record["roofs"]):
            tokens = ", ".join(map(str, sorted({point["tokens"] for point in layer["points"]})))
            caption = self.text.caption("figure", tokens=tokens, **layer_names(layer["bench"]))
            draw = partial(_draw, layer, record["limits"])
            drawings.append(Drawing(f"{self.name}-{number}", caption, draw))
        return drawings

    def tables(self, record: Entry) -> Sequence[Table]:
        limits = record["limits"]
        peaks = sorted(limits["flops_per_second"].items())
        rows = [
            point
            for layer in record["roofs"]
            for point in rated_points(layer, limits)
            if point["tokens"] == BLOCK_LENGTH
        ]
        rates = ", ".join(f"{peak / 1e9:.0f} in {dtype}" for dtype, peak in peaks)
        machine = machine_values(record)
        return [self.text.table("points", rows, block=BLOCK_LENGTH, peaks=rates, **machine)]

    def findings(self, record: Entry) -> Sequence[Finding | str]:
        limits = record["limits"]
        return [
            *(finding for layer in record["roofs"] for finding in self._findings(layer, limits)),
            *record["skipped"],
            *timing.load_warnings(record["machine"]),
        ]

    def _findings(self, layer: Entry, limits: timing.DeviceLimits) -> list[Finding]:
        points = rated_points(layer, limits)
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


def _measure_layer(
    context: StudyContext, bench: BenchLayer, limits: timing.DeviceLimits, time_runs: RunTimer
) -> Entry:
    """Route blocks of every size under every policy, time the experts, count operations."""
    runs = {
        (policy, tokens): run
        for tokens in TOKEN_COUNTS
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


def _draw(layer: Entry, limits: timing.DeviceLimits) -> Figure:
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
