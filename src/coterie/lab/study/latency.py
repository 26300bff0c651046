"""Latency against experts (Fig. 2, right), and how well Equation 2 tells it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.lab.bench.routings import BLOCK_LENGTH, balanced_routing
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.bench.timing import (
    FULL_BUDGET,
    DeviceLimits,
    LatencyFit,
    TimingBudget,
    TimingConditions,
    TimingStats,
    describe_conditions,
    fit_latency,
    load_warnings,
    measure_limits,
    predict_seconds,
    time_interleaved,
    timing_conditions,
)
from coterie.lab.plotting import SERIES_COLOURS, add_legend, foreground, new_axes
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.layers import (
    BenchLayer,
    BenchLayerInfo,
    ProgressCallback,
    for_each_layer,
    layer_description,
)
from coterie.lab.study.routings import INPUTS_PER_WIDTH, make_blocks, rotate_inputs, route_blocks

TOKEN_COUNTS = (8, 16, 32, 64)
EXPERT_COUNTS = (
    8,
    12,
    19,
    25,
    38,
    51,
    64,
    84,
    112,
    128,
    163,
    200,
    256,
)  # unique experts that are tried
ROUNDS = {False: 40, True: 8}  # of the model's own small layer, of a large one
CHECKED_POLICIES = ("vanilla", "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
MARKERS = ("o", "s", "D", "^")
MIN_R2 = 0.95  # R^2 from which Equation 2 is said to hold


class LatencyPoint(TypedDict):
    """``tokens`` that use exactly ``used`` experts, ``pairs`` token-expert pairs."""

    tokens: int
    used: int
    pairs: int
    seconds: TimingStats


class FitCheck(TypedDict):
    """A block as a router would route it, held against what the fit says of it."""

    policy: str
    used: float
    pairs: float
    seconds: TimingStats
    predicted: float


class LayerLatency(TypedDict):
    """One layer: its size, what was measured, and the line through it.

    ``read`` is the bandwidth that ``b`` amounts to, in bytes a second; None where b is not above 0.
    """

    bench: BenchLayerInfo
    points: list[LatencyPoint]
    fit: LatencyFit
    read: float | None
    checks: list[FitCheck]


class LatencyRecord(TypedDict):
    machine: TimingConditions
    limits: DeviceLimits
    lines: list[LayerLatency]
    skipped: list[str]


@dataclass(frozen=True)
class LatencyExperiment:
    """Layers timed in turns with experts and tokens set, and a plane laid through the times."""

    name: str = "latency"
    title: str = "Latency against experts (Fig. 2, right)"
    question: str = (
        "Is the time of a layer of experts set by how many different experts it reads, "
        "or by how many words pass through it?"
    )

    shapes: Sequence[LayerShape] = PAPER_LAYERS
    pace: TimingBudget = FULL_BUDGET

    def measure(self, context: StudyContext) -> ExperimentData:
        context.on_progress(0.0, "how fast this machine reads and multiplies")
        device = context.engine.model.transformer.device
        dtypes = {context.engine.model.transformer.dtype, *(shape.dtype for shape in self.shapes)}
        machine_limits = measure_limits(device, dtypes, self.pace)
        layers, skipped = for_each_layer(
            context,
            self.shapes,
            lambda bench, tell: measure_layer_latency(
                context, bench, on_progress=tell, pace=self.pace
            ),
        )
        return cast(
            "ExperimentData",
            LatencyRecord(
                machine=timing_conditions(device),
                limits=machine_limits,
                lines=layers,
                skipped=skipped,
            ),
        )

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("LatencyRecord", data)
        return [
            Drawing(
                f"{self.name}-{number}",
                f"The experts of {layer_description(layer['bench'])}: time against the unique experts that are "
                "read, for different numbers of tokens. Lines are the fit of Equation 2, bars span "
                "the quartiles.",
                lambda one=layer: _draw(one),
            )
            for number, layer in enumerate(record["lines"])
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("LatencyRecord", data)
        return [
            _fit_table(record),
            *(_check_table(layer) for layer in record["lines"] if layer["checks"]),
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("LatencyRecord", data)
        read = record["limits"]["bytes_per_second"]
        layers = record["lines"]
        findings_list = [
            *map(_linearity_finding, layers),
            *(_reading_finding(layer, read) for layer in layers if layer["checks"]),
        ]
        return [*findings_list, *record["skipped"], *load_warnings(record["machine"])]


def measure_layer_latency(
    context: StudyContext,
    bench: BenchLayer,
    *,
    on_progress: ProgressCallback,
    pace: TimingBudget = FULL_BUDGET,
) -> LayerLatency:
    """Measure a layer over a grid of tokens and experts, and fit it."""
    rounds = pace.rounds or ROUNDS[bench.random]
    draw = torch.Generator().manual_seed(0)
    grid = {
        (tokens, used): _controlled_run(bench, tokens, used, draw)
        for tokens in TOKEN_COUNTS
        for used in sorted({bench.router.k, *EXPERT_COUNTS, bench.router.experts})
        if bench.router.k <= used <= min(tokens * bench.router.k, bench.router.experts)
    }
    scored_blocks = make_blocks(context, bench, BLOCK_LENGTH)
    checks = (
        {policy: route_blocks(bench, scored_blocks, policy) for policy in CHECKED_POLICIES}
        if scored_blocks
        else {}
    )
    runs = {**grid, **{policy: block.run for policy, block in checks.items()}}
    timings = time_interleaved(runs, rounds, device=bench.device, on_progress=on_progress)
    points = [
        LatencyPoint(
            tokens=tokens, used=used, pairs=tokens * bench.router.k, seconds=timings[tokens, used]
        )
        for tokens, used in grid
    ]
    fitted = fit_points(points)
    return LayerLatency(
        bench=bench.to_info(),
        points=points,
        fit=fitted,
        read=bench.expert_bytes / fitted["b"] if fitted["b"] > 0 else None,
        checks=[
            FitCheck(
                policy=policy,
                used=block.used,
                pairs=block.pairs,
                seconds=timings[policy],
                predicted=predict_seconds(fitted, block.used, block.pairs),
            )
            for policy, block in checks.items()
        ],
    )


def fit_points(points: Sequence[LatencyPoint]) -> LatencyFit:
    """Through the medians."""
    return fit_latency(
        [point["used"] for point in points],
        [point["pairs"] for point in points],
        [point["seconds"]["median"] for point in points],
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
    figure, plot = new_axes(f"unique experts of {layer['bench']['experts']}", "milliseconds")
    for tokens, color, marker in zip(TOKEN_COUNTS, SERIES_COLOURS, MARKERS, strict=False):
        points = [point for point in layer["points"] if point["tokens"] == tokens]
        if points:
            _draw_tokens(plot, layer["fit"], points, color=color, marker=marker)
    for check in layer["checks"]:
        ms = check["seconds"]["median"] * 1e3
        plot.plot(
            check["used"],
            ms,
            marker="x",
            color=foreground(),
            linestyle="",
            label="routed blocks of 32",
        )
    slowest = max(point["seconds"]["median"] for point in layer["points"])
    plot.set(xlim=(0, None), ylim=(0, 1.25e3 * slowest))
    add_legend(plot, columns=3)
    return figure


def _draw_tokens(
    plot: Axes, fitted: LatencyFit, points: Sequence[LatencyPoint], *, color: str, marker: str
) -> None:
    used = [point["used"] for point in points]
    timings = [point["seconds"] for point in points]
    medians = [timing["median"] * 1e3 for timing in timings]
    lower = [(timing["median"] - timing["low"]) * 1e3 for timing in timings]
    upper = [(timing["high"] - timing["median"]) * 1e3 for timing in timings]
    label = f"{points[0]['tokens']} tokens"
    plot.errorbar(
        used, medians, yerr=[lower, upper], fmt=marker, color=color, label=label, elinewidth=1
    )
    ends = (min(used), max(used))
    fit_ms = [predict_seconds(fitted, end, points[0]["pairs"]) * 1e3 for end in ends]
    plot.plot(ends, fit_ms, color=color, linewidth=1)


def _fit_table(record: LatencyRecord) -> Table:
    rows = []
    for layer in record["lines"]:
        fitted, bench = layer["fit"], layer["bench"]
        rows.append(
            [
                bench["name"] + (" (random)" if bench["random"] else ""),
                f"{bench['experts']} x 3 x {bench['hidden']} x {bench['width']} {bench['dtype']}",
                f"{fitted['t0'] * 1e3:.3f}",
                f"{fitted['b'] * 1e6:.2f}",
                f"{fitted['a'] * 1e6:.3f}",
                f"{fitted['r2']:.4f}",
                f"{fitted['error']:.1%}",
                "" if layer["read"] is None else f"{layer['read'] / 1e9:.1f}",
            ]
        )
    machine_limits = record["limits"]
    return Table(
        heads=["layer", "experts", "t0, ms", "b, us", "a, us", "R2", "median error", "GB/s by b"],
        rows=rows,
        caption="t = t0 + b T + a N K, least squares over the medians of all points. "
        f"This machine reads {machine_limits['bytes_per_second'] / 1e9:.1f} GB/s ({machine_limits['reader']}, "
        f"{describe_conditions(record['machine'])}).",
        numbers=list(range(2, 8)),
    )


def _check_table(layer: LayerLatency) -> Table:
    source = "routed by a skewed router" if layer["bench"]["random"] else "as they come in decoding"
    return Table(
        heads=["policy", "unique experts", "measured, ms", "by the fit, ms", "off by"],
        rows=[
            [
                check["policy"],
                f"{check['used']:.1f}",
                f"{check['seconds']['median'] * 1e3:.2f}",
                f"{check['predicted'] * 1e3:.2f}",
                f"{check['predicted'] / check['seconds']['median'] - 1:+.1%}",
            ]
            for check in layer["checks"]
        ],
        caption=f"Blocks of {BLOCK_LENGTH}, {source}, through the experts of {layer_description(layer['bench'])}; the "
        "fit saw none of these.",
        numbers=[1, 2, 3, 4],
    )


def _linearity_finding(layer: LayerLatency) -> Finding:
    fitted = layer["fit"]
    description = layer_description(layer["bench"])
    return Finding(
        f"{description[0].upper()}{description[1:]}: each unique expert costs {fitted['b'] * 1e6:.1f} us, "
        f"each token's use of one {fitted['a'] * 1e6:.2f} us, and {fitted['t0'] * 1e3:.2f} ms go "
        f"whatever is read; R2 is {fitted['r2']:.3f}, the fit is off by {fitted['error']:.1%} at the "
        "median.",
        claim="Equation 2: the latency of a MoE layer is linear in its unique experts.",
        verdict="holds" if fitted["r2"] >= MIN_R2 and fitted["b"] > 0 else "does not hold",
    )


def _reading_finding(layer: LayerLatency, read: float) -> Finding:
    vanilla = next(check for check in layer["checks"] if check["policy"] == CHECKED_POLICIES[0])
    share = layer["fit"]["b"] * vanilla["used"] / vanilla["predicted"]
    rate = ""
    if layer["read"] is not None:
        rate = (
            f" b amounts to {layer['read'] / 1e9:.1f} GB/s, {layer['read'] / read:.0%} of what this"
        )
        rate += " machine reads at best"
        rate += ": they come out of its caches." if layer["read"] > read else "."
    return Finding(
        f"Of a vanilla block of {BLOCK_LENGTH}, which uses {vanilla['used']:.0f} experts of "
        f"{layer_description(layer['bench'])}, {share:.0%} of the time goes with the experts read.{rate}",
        claim="Reading experts is what a MoE layer's time goes into.",
        verdict="holds" if share >= 0.5 else "does not hold",
    )
