"""The roofline of the MoE layer (Fig. 1b): what it does for each byte it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypedDict, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.lab.bench.routings import BLOCK_LENGTH
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.bench.timing import (
    FULL_BUDGET,
    DeviceLimits,
    TimingBudget,
    TimingConditions,
    TimingStats,
    describe_conditions,
    dtype_name,
    fit_latency,
    load_warnings,
    measure_limits,
    predict_seconds,
    time_interleaved,
    timing_conditions,
)
from coterie.lab.plotting import add_legend, foreground, new_axes, policy_style
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.layers import (
    BenchLayer,
    BenchLayerInfo,
    ProgressCallback,
    for_each_layer,
    layer_description,
)
from coterie.lab.study.routings import RoutedBlocks, make_blocks, route_blocks

TOKEN_COUNTS = (1, 8, 16, 32, 64)
VANILLA = "vanilla"
POLICIES = (VANILLA, "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
LINE_ALPHAS = (1.0, 1.0, 0.55, 1.0)  # the two sizes of one policy
ROUNDS = {False: 30, True: 6}  # for the model's own small layer, for a large one
MIN_READING_SHARE = 2 / 3  # of the time: below it, what is read does not bind a layer


class RooflinePoint(TypedDict):
    """The experts of one forward: ``tokens`` positions, ``used`` unique experts on average,
    ``pairs`` of a token and an expert. ``intensity``: operations for each byte of experts read.
    """

    policy: str
    tokens: int
    used: float
    pairs: float
    intensity: float
    flops: float
    seconds: TimingStats


class LayerRoofline(TypedDict):
    """One layer under its roof: ``peak`` in operations a second, in the layer's dtype."""

    bench: BenchLayerInfo
    peak: float
    points: list[RooflinePoint]


class RooflineRecord(TypedDict):
    machine: TimingConditions
    limits: DeviceLimits
    roofs: list[LayerRoofline]
    skipped: list[str]


@dataclass(frozen=True)
class RooflineExperiment:
    """Bytes are counted from the experts used, operations from the token-expert pairs; both roofs
    and every point's rate are measured."""

    name: str = "roofline"
    title: str = "The roofline of the MoE layer (Fig. 1b)"
    question: str = (
        "A processor can read so many bytes and make so many operations a second. "
        "Which of the two holds a layer of experts back, and what does a coreset change?"
    )

    shapes: Sequence[LayerShape] = PAPER_LAYERS
    pace: TimingBudget = FULL_BUDGET

    def measure(self, context: StudyContext) -> ExperimentData:
        context.on_progress(0.0, "how fast this machine reads and multiplies")
        transformer = context.engine.model.transformer
        dtypes = {transformer.dtype, *(shape.dtype for shape in self.shapes)}
        machine_limits = measure_limits(transformer.device, dtypes, self.pace)

        roofs, skipped = for_each_layer(
            context,
            self.shapes,
            lambda bench, tell: measure_roofline(
                context, bench, machine_limits, on_progress=tell, pace=self.pace
            ),
        )
        return cast(
            "ExperimentData",
            RooflineRecord(
                machine=timing_conditions(transformer.device),
                limits=machine_limits,
                roofs=roofs,
                skipped=skipped,
            ),
        )

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("RooflineRecord", data)
        return [
            Drawing(
                f"{self.name}-{number}",
                f"The experts of {layer_description(layer['bench'])}: operations a second against operations "
                f"per byte of experts read, with {_format_token_counts(layer)} tokens from left to right. The "
                "line is what this machine could do at best.",
                lambda one=layer: _draw(one, record["limits"]),
            )
            for number, layer in enumerate(record["roofs"])
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("RooflineRecord", data)
        machine_limits = record["limits"]
        heads = ["layer", "policy", "experts", "MB read", "op/byte", "ms", "Gop/s", "of attainable"]
        peaks = sorted(machine_limits["flops_per_second"].items())
        peaks_text = ", ".join(f"{peak / 1e9:.0f} in {dtype}" for dtype, peak in peaks)
        return [
            Table(
                heads=heads,
                rows=[
                    _row(layer, point, machine_limits)
                    for layer in record["roofs"]
                    for point in layer["points"]
                    if point["tokens"] == BLOCK_LENGTH
                ],
                caption=f"With {BLOCK_LENGTH} tokens. At best ({describe_conditions(record['machine'])}) this "
                f"machine reads {machine_limits['bytes_per_second'] / 1e9:.1f} GB/s ({machine_limits['reader']}) "
                f"and makes so many billion operations a second: {peaks_text}.",
                numbers=list(range(2, len(heads))),
            )
        ]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("RooflineRecord", data)
        findings_by_layer = [
            _roofline_findings(layer, record["limits"]) for layer in record["roofs"]
        ]
        return [
            *chain.from_iterable(findings_by_layer),
            *record["skipped"],
            *load_warnings(record["machine"]),
        ]


def measure_roofline(
    context: StudyContext,
    bench: BenchLayer,
    machine_limits: DeviceLimits,
    *,
    on_progress: ProgressCallback,
    pace: TimingBudget = FULL_BUDGET,
) -> LayerRoofline:
    """Route blocks of every size under every policy, time the experts, count what they do."""
    runs: dict[tuple[str, int], RoutedBlocks] = {}
    for tokens in TOKEN_COUNTS:
        scored_blocks = make_blocks(context, bench, tokens)
        for policy in POLICIES if scored_blocks else ():
            runs[policy, tokens] = route_blocks(bench, scored_blocks, policy)
    rounds = pace.rounds or ROUNDS[bench.random]
    callables = {key: block.run for key, block in runs.items()}
    timings = time_interleaved(callables, rounds, device=bench.device, on_progress=on_progress)
    points = [
        RooflinePoint(
            policy=policy,
            tokens=tokens,
            used=block.used,
            pairs=block.pairs,
            intensity=bench.flops(block.pairs) / (block.used * bench.expert_bytes),
            flops=bench.flops(block.pairs),
            seconds=timings[policy, tokens],
        )
        for (policy, tokens), block in runs.items()
    ]
    peak = machine_limits["flops_per_second"][dtype_name(bench.tokens_dtype)]
    return LayerRoofline(bench=bench.to_info(), peak=peak, points=points)


def attainable_flops(intensity: float, peak: float, bytes_per_second: float) -> float:
    """Operations a second under the roof."""
    return min(peak, intensity * bytes_per_second)


def _draw(layer: LayerRoofline, machine_limits: DeviceLimits) -> Figure:
    figure, plot = new_axes("operations per byte read", "billion operations a second")
    read, peak = machine_limits["bytes_per_second"], layer["peak"]
    intensities = [point["intensity"] for point in layer["points"]]
    left, right = min(intensities) / 2, max(4 * peak / read, 2 * max(intensities))
    ridge = peak / read
    roofline = [attainable_flops(intensity, peak, read) / 1e9 for intensity in (left, ridge, right)]
    plot.plot((left, ridge, right), roofline, color=foreground(), linewidth=1.2)
    for policy, shade in zip(POLICIES, LINE_ALPHAS, strict=True):
        points = [point for point in layer["points"] if point["policy"] == policy]
        _draw_policy(plot, policy, points, shade)
    plot.set(xscale="log", yscale="log", xlim=(left, right))
    plot.grid(which="minor", visible=False)
    plot.xaxis.set_major_formatter("{x:g}")
    plot.yaxis.set_major_formatter("{x:g}")
    add_legend(plot)
    return figure


def _draw_policy(plot: Axes, policy: str, points: Sequence[RooflinePoint], shade: float) -> None:
    xs = [point["intensity"] for point in points]
    ys = [point["flops"] / point["seconds"]["median"] / 1e9 for point in points]
    plot.plot(
        xs,
        ys,
        color=policy_style(policy).colour,
        marker=policy_style(policy).marker,
        alpha=shade,
        linewidth=0.8,
        label=policy,
    )
    if policy == VANILLA:
        for x, y, point in zip(xs, ys, points, strict=True):
            plot.annotate(
                f"{point['tokens']}",
                (x, y),
                xytext=(-5, 4),
                textcoords="offset points",
                ha="right",
                fontsize=8.5,
            )


def _row(layer: LayerRoofline, point: RooflinePoint, machine_limits: DeviceLimits) -> list[str]:
    bench, rate = layer["bench"], point["flops"] / point["seconds"]["median"]
    attainable_rate = attainable_flops(
        point["intensity"], layer["peak"], machine_limits["bytes_per_second"]
    )
    return [
        bench["name"] + (" (random)" if bench["random"] else ""),
        point["policy"],
        f"{point['used']:.1f}",
        f"{point['used'] * bench['expert_bytes'] / 1e6:.2f}",
        f"{point['intensity']:.2f}",
        f"{point['seconds']['median'] * 1e3:.2f}",
        f"{rate / 1e9:.1f}",
        f"{rate / attainable_rate:.0%}",
    ]


def reading_share(points: Sequence[RooflinePoint], point: RooflinePoint) -> float:
    """Share of a point's time that goes with its unique experts, by the fit of Equation 2 through
    all points of its layer."""
    fitted = fit_latency(
        [entry["used"] for entry in points],
        [entry["pairs"] for entry in points],
        [entry["seconds"]["median"] for entry in points],
    )
    total = predict_seconds(fitted, point["used"], point["pairs"])
    return min(1.0, max(0.0, fitted["b"] * point["used"] / total))


def _roofline_findings(layer: LayerRoofline, machine_limits: DeviceLimits) -> list[Finding]:
    by_policy = {
        point["policy"]: point for point in layer["points"] if point["tokens"] == BLOCK_LENGTH
    }
    if VANILLA not in by_policy:
        return []
    vanilla, ridge = by_policy[VANILLA], layer["peak"] / machine_limits["bytes_per_second"]
    best = attainable_flops(vanilla["intensity"], layer["peak"], machine_limits["bytes_per_second"])
    share = vanilla["flops"] / vanilla["seconds"]["median"] / best
    reading = reading_share(layer["points"], vanilla)
    description = layer_description(layer["bench"])
    text = (
        f"With {BLOCK_LENGTH} tokens, {description} makes {vanilla['intensity']:.1f} operations per byte; this "
        f"machine needs {ridge:.1f} before arithmetic holds it back. It reaches {share:.0%} of "
        f"what its reading rate would allow, and {reading:.0%} of the time goes with the experts "
        "that are read"
    )
    if reading < MIN_READING_SHARE:
        text += ": it is bound by the overhead of many small operations, not by memory"
    low = vanilla["intensity"] < ridge
    return [
        Finding(
            f"{text}.",
            claim="The MoE layer of a parallel decoder is bound by memory, not by arithmetic.",
            verdict="holds" if low and reading >= MIN_READING_SHARE else "does not hold",
        ),
        _speedup_finding(vanilla, by_policy["des-vote:beta=0.15"], description),
    ]


def _speedup_finding(vanilla: RooflinePoint, coreset: RooflinePoint, name: str) -> Finding:
    rate_before, rate_after = (p["flops"] / p["seconds"]["median"] for p in (vanilla, coreset))
    return Finding(
        f"Under {coreset['policy']} {name} reads {coreset['used']:.0f} experts in place of "
        f"{vanilla['used']:.0f}: {coreset['intensity']:.1f} operations per byte in place of "
        f"{vanilla['intensity']:.1f}, and {rate_after / rate_before:.2f} times as many a second.",
        claim="A coreset makes more of every byte read, so the layer runs faster.",
        verdict="holds"
        if coreset["seconds"]["high"] < vanilla["seconds"]["low"]
        else "does not hold",
    )


def _format_token_counts(layer: LayerRoofline) -> str:
    tokens = sorted({point["tokens"] for point in layer["points"]})
    return ", ".join(map(str, tokens))
