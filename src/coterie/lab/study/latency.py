"""Latency against experts (Fig. 2, right), and the fit of Equation 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from matplotlib.figure import Figure

from coterie.lab.bench import timing
from coterie.lab.bench.routings import BLOCK_LENGTH, balanced_routing
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.plotting import SeriesStyle, add_legend, foreground, indexed_style, new_axes
from coterie.lab.study.charts import (
    Series,
    draw_series,
    milliseconds,
    timing_series,
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
from coterie.lab.study.layers import (
    INPUTS_PER_WIDTH,
    BenchLayer,
    BenchLayerInfo,
    ProgressCallback,
    for_each_layer,
    layer_description,
    layer_label,
    make_blocks,
    rotate_inputs,
    route_blocks,
)

TOKEN_COUNTS = (8, 16, 32, 64)
EXPERT_COUNTS = (8, 12, 19, 25, 38, 51, 64, 84, 112, 128, 163, 200, 256)  # unique experts timed
ROUNDS = {False: 40, True: 8}  # of the model's own small layers, of a large random layer
CHECKED_POLICIES = ("vanilla", "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
MIN_R2 = 0.95  # least R^2 at which Equation 2 holds


class LatencyPoint(TypedDict):
    """``tokens`` that use exactly ``used`` experts in ``pairs`` token-expert pairs."""

    tokens: int
    used: int
    pairs: int
    seconds: timing.TimingStats


class FitCheck(TypedDict):
    """A block routed by a policy, and the prediction of the fit."""

    policy: str
    used: float
    pairs: float
    seconds: timing.TimingStats
    predicted: float


class LayerLatency(TypedDict):
    """One layer: its shape, the measured points, and the fit through them.

    ``read`` is 1/b as a bandwidth in bytes per second; None where b is not positive.
    """

    bench: BenchLayerInfo
    points: list[LatencyPoint]
    fit: timing.LatencyFit
    read: float | None
    checks: list[FitCheck]


class LatencyRecord(TypedDict):
    machine: timing.TimingConditions
    limits: timing.DeviceLimits
    lines: list[LayerLatency]
    skipped: list[str]


@dataclass(frozen=True)
class LatencyExperiment(Experiment):
    """Layers timed in turns over a grid of tokens and experts, and a plane fitted to the times."""

    text = ExperimentText.load("latency")

    shapes: Sequence[LayerShape] = PAPER_LAYERS
    pace: timing.TimingBudget = timing.FULL_BUDGET

    def measure(self, context: StudyContext) -> LatencyRecord:
        context.on_progress(0.0, "memory bandwidth and arithmetic of this machine")
        transformer = context.engine.model.transformer
        dtypes = {transformer.dtype, *(shape.dtype for shape in self.shapes)}
        machine_limits = timing.measure_limits(transformer.device, dtypes, self.pace)
        layers, skipped = for_each_layer(
            context,
            self.shapes,
            lambda bench, on_progress: measure_layer_latency(
                context, bench, on_progress=on_progress, pace=self.pace
            ),
        )
        machine = timing.timing_conditions(transformer.device)
        return LatencyRecord(machine=machine, limits=machine_limits, lines=layers, skipped=skipped)

    def drawings(self, record: LatencyRecord) -> Sequence[Drawing]:
        return [
            Drawing(
                f"{self.name}-{number}",
                f"The experts of {layer_description(layer['bench'])}: time against unique experts, "
                "for several numbers of tokens. Lines are the fit of Equation 2, bars are "
                "quartiles.",
                lambda layer=layer: _draw(layer),
            )
            for number, layer in enumerate(record["lines"])
        ]

    def tables(self, record: LatencyRecord) -> Sequence[Table]:
        checked = [layer for layer in record["lines"] if layer["checks"]]
        return [_fit_table(record), *map(_check_table, checked)]

    def findings(self, record: LatencyRecord) -> Sequence[Finding | str]:
        layers, bandwidth = record["lines"], record["limits"]["bytes_per_second"]
        return [
            *map(_linearity_finding, layers),
            *(_reading_finding(layer, bandwidth) for layer in layers if layer["checks"]),
            *record["skipped"],
            *timing.load_warnings(record["machine"]),
        ]


def measure_layer_latency(
    context: StudyContext,
    bench: BenchLayer,
    *,
    on_progress: ProgressCallback,
    pace: timing.TimingBudget = timing.FULL_BUDGET,
) -> LayerLatency:
    """Time a layer over a grid of tokens and experts, and fit Equation 2."""
    rounds = pace.rounds or ROUNDS[bench.random]
    draw, k = torch.Generator().manual_seed(0), bench.router.k
    grid = {
        (tokens, used): _controlled_run(bench, tokens, used, draw)
        for tokens in TOKEN_COUNTS
        for used in sorted({k, *EXPERT_COUNTS, bench.router.experts})
        if k <= used <= min(tokens * k, bench.router.experts)
    }
    scored_blocks = make_blocks(context, bench, BLOCK_LENGTH)
    policies = CHECKED_POLICIES if scored_blocks else ()
    checks = {policy: route_blocks(bench, scored_blocks, policy) for policy in policies}
    runs = {**grid, **{policy: block.run for policy, block in checks.items()}}
    timings = timing.time_interleaved(runs, rounds, device=bench.device, on_progress=on_progress)
    points = [
        LatencyPoint(tokens=tokens, used=used, pairs=tokens * k, seconds=timings[tokens, used])
        for tokens, used in grid
    ]
    fit = timing.fit_latency(
        [point["used"] for point in points],
        [point["pairs"] for point in points],
        [point["seconds"]["median"] for point in points],
    )
    return LayerLatency(
        bench=bench.to_info(),
        points=points,
        fit=fit,
        read=bench.expert_bytes / fit["b"] if fit["b"] > 0 else None,
        checks=[
            FitCheck(
                policy=policy,
                used=block.used,
                pairs=block.pairs,
                seconds=timings[policy],
                predicted=timing.predict_seconds(fit, block.used, block.pairs),
            )
            for policy, block in checks.items()
        ],
    )


def _controlled_run(
    bench: BenchLayer, tokens: int, used: int, draw: torch.Generator
) -> Callable[[], object]:
    routings = [
        balanced_routing(bench.router, tokens, used, draw, bench.device)
        for _ in range(max(INPUTS_PER_WIDTH, len(bench.slabs)))
    ]
    return rotate_inputs(bench, [bench.inputs(tokens, draw) for _ in routings], routings)


def _draw(layer: LayerLatency) -> Figure:
    figure, ax = new_axes(f"unique experts of {layer['bench']['experts']}", "milliseconds")
    for index, tokens in enumerate(TOKEN_COUNTS):
        points = [point for point in layer["points"] if point["tokens"] == tokens]
        if not points:
            continue
        used, style = [point["used"] for point in points], indexed_style(index)
        timings = [point["seconds"] for point in points]
        draw_series(ax, timing_series(style, used, timings, f"{tokens} tokens", ""))
        ends, pairs = (min(used), max(used)), points[0]["pairs"]
        fit_ms = [timing.predict_seconds(layer["fit"], end, pairs) * 1e3 for end in ends]
        ax.plot(ends, fit_ms, color=style.colour, linewidth=1)
    checks, label = layer["checks"], f"routed blocks of {BLOCK_LENGTH}"
    x, y = [c["used"] for c in checks], [c["seconds"]["median"] * 1e3 for c in checks]
    if checks:
        draw_series(ax, Series(label, x, y, SeriesStyle(foreground(), "x", ""), line=""))
    slowest = max(point["seconds"]["median"] for point in layer["points"])
    ax.set(xlim=(0, None), ylim=(0, 1.25e3 * slowest))
    add_legend(ax, columns=3)
    return figure


def _fit_table(record: LatencyRecord) -> Table:
    limits = record["limits"]
    return make_table(
        "t = t0 + b T + a N K, least squares over the medians of all points. This machine reads "
        f"{limits['bytes_per_second'] / 1e9:.1f} GB/s ({limits['reader']}, "
        f"{timing.describe_conditions(record['machine'])}).",
        record["lines"],
        {
            "layer": lambda layer: layer_label(layer["bench"]),
            "experts": "{bench[experts]} x 3 x {bench[hidden]} x {bench[width]} {bench[dtype]}",
            "t0, ms": lambda layer: f"{layer['fit']['t0'] * 1e3:.3f}",
            "b, us": lambda layer: f"{layer['fit']['b'] * 1e6:.2f}",
            "a, us": lambda layer: f"{layer['fit']['a'] * 1e6:.3f}",
            "R2": "{fit[r2]:.4f}",
            "median error": "{fit[error]:.1%}",
            "GB/s by b": lambda layer: f"{layer['read'] / 1e9:.1f}" if layer["read"] else "",
        },
        text_columns=2,
    )


def _check_table(layer: LayerLatency) -> Table:
    source = "of a skewed router" if layer["bench"]["random"] else "from real decoding"
    return make_table(
        f"Blocks of {BLOCK_LENGTH} {source}, through the experts of "
        f"{layer_description(layer['bench'])}. The fit does not include these points.",
        layer["checks"],
        {
            "policy": "{policy}",
            "unique experts": "{used:.1f}",
            "measured, ms": lambda check: milliseconds(check["seconds"]),
            "predicted, ms": lambda check: f"{check['predicted'] * 1e3:.2f}",
            "error": lambda c: f"{c['predicted'] / c['seconds']['median'] - 1:+.1%}",
        },
    )


def _linearity_finding(layer: LayerLatency) -> Finding:
    fit, description = layer["fit"], layer_description(layer["bench"])
    return judge(
        f"{description[0].upper()}{description[1:]}: each unique expert costs {fit['b'] * 1e6:.1f} "
        f"us, each token-expert pair {fit['a'] * 1e6:.2f} us, and the layer itself "
        f"{fit['t0'] * 1e3:.2f} ms; R2 is {fit['r2']:.3f}, the median error {fit['error']:.1%}.",
        "Equation 2: the latency of an MoE layer is linear in its unique experts.",
        fit["r2"] >= MIN_R2 and fit["b"] > 0,
    )


def _reading_finding(layer: LayerLatency, bandwidth: float) -> Finding:
    vanilla = next(check for check in layer["checks"] if check["policy"] == CHECKED_POLICIES[0])
    share, read = layer["fit"]["b"] * vanilla["used"] / vanilla["predicted"], layer["read"]
    rate = ""
    if read is not None:
        cached = ", because they are in its caches" if read > bandwidth else ""
        rate = (
            f" The rate 1/b is {read / 1e9:.1f} GB/s, {read / bandwidth:.0%} of this machine's "
            f"memory bandwidth{cached}."
        )
    return judge(
        f"A vanilla block of {BLOCK_LENGTH} uses {vanilla['used']:.0f} experts of "
        f"{layer_description(layer['bench'])}; {share:.0%} of its time is proportional to the "
        f"experts read.{rate}",
        "Most of the time of an MoE layer is spent on reading experts.",
        share >= 0.5,
    )
