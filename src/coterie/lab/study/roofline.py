"""The roofline of the MoE layer (Fig. 1b): operations per byte of experts read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from matplotlib.figure import Figure

from coterie.lab.bench import timing
from coterie.lab.bench.routings import BLOCK_LENGTH
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.plotting import add_legend, foreground, new_axes
from coterie.lab.study.charts import draw_series, milliseconds, policy_series
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
    BenchLayer,
    BenchLayerInfo,
    ProgressCallback,
    RoutedBlocks,
    for_each_layer,
    layer_description,
    layer_label,
    make_blocks,
    route_blocks,
)

TOKEN_COUNTS = (1, 8, 16, 32, 64)
VANILLA = "vanilla"
POLICIES = (VANILLA, "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
LINE_ALPHAS = (1.0, 1.0, 0.55, 1.0)  # distinguish the two sizes of DES-Vote
ROUNDS = {False: 30, True: 6}  # of the model's own small layers, of a large random layer
MIN_READING_SHARE = 2 / 3  # of the time: below it, memory does not bound the layer


class RooflinePoint(TypedDict):
    """The experts of one forward of ``tokens`` positions, means over blocks.

    ``used`` counts unique experts, ``pairs`` token-expert pairs, and ``intensity`` operations per
    byte of experts read.
    """

    policy: str
    tokens: int
    used: float
    pairs: float
    intensity: float
    flops: float
    seconds: timing.TimingStats


class LayerRoofline(TypedDict):
    """One layer; ``peak`` is in operations per second, in the layer's dtype."""

    bench: BenchLayerInfo
    peak: float
    points: list[RooflinePoint]


class RooflineRecord(TypedDict):
    machine: timing.TimingConditions
    limits: timing.DeviceLimits
    roofs: list[LayerRoofline]
    skipped: list[str]


@dataclass(frozen=True)
class RooflineExperiment(Experiment):
    """Bytes from the experts in use, operations from token-expert pairs, both roofs measured."""

    text = ExperimentText.load("roofline")

    shapes: Sequence[LayerShape] = PAPER_LAYERS
    pace: timing.TimingBudget = timing.FULL_BUDGET

    def measure(self, context: StudyContext) -> RooflineRecord:
        context.on_progress(0.0, "memory bandwidth and arithmetic of this machine")
        transformer = context.engine.model.transformer
        dtypes = {transformer.dtype, *(shape.dtype for shape in self.shapes)}
        limits = timing.measure_limits(transformer.device, dtypes, self.pace)
        roofs, skipped = for_each_layer(
            context,
            self.shapes,
            lambda bench, on_progress: measure_roofline(
                context, bench, limits, on_progress=on_progress, pace=self.pace
            ),
        )
        machine = timing.timing_conditions(transformer.device)
        return RooflineRecord(machine=machine, limits=limits, roofs=roofs, skipped=skipped)

    def drawings(self, record: RooflineRecord) -> Sequence[Drawing]:
        return [
            Drawing(
                f"{self.name}-{number}",
                f"The experts of {layer_description(layer['bench'])}: operations per second "
                "against operations per byte of experts read, with "
                f"{', '.join(map(str, sorted({p['tokens'] for p in layer['points']})))} tokens "
                "from left to right. The line is the limit of this machine.",
                lambda layer=layer: _draw(layer, record["limits"]),
            )
            for number, layer in enumerate(record["roofs"])
        ]

    def tables(self, record: RooflineRecord) -> Sequence[Table]:
        limits = record["limits"]
        read, peaks = limits["bytes_per_second"], sorted(limits["flops_per_second"].items())
        peaks_text = ", ".join(f"{peak / 1e9:.0f} in {dtype}" for dtype, peak in peaks)
        rows = [
            (layer, point)
            for layer in record["roofs"]
            for point in layer["points"]
            if point["tokens"] == BLOCK_LENGTH
        ]
        return [
            make_table(
                f"With {BLOCK_LENGTH} tokens. The limits of this machine "
                f"({timing.describe_conditions(record['machine'])}): {read / 1e9:.1f} GB/s "
                f"({limits['reader']}), and in billion operations per second {peaks_text}.",
                rows,
                {
                    "layer": lambda row: layer_label(row[0]["bench"]),
                    "policy": "{0[1][policy]}",
                    "experts": "{0[1][used]:.1f}",
                    "MB read": lambda row: f"{read_bytes(*row) / 1e6:.2f}",
                    "op/byte": "{0[1][intensity]:.2f}",
                    "ms": lambda row: milliseconds(row[1]["seconds"]),
                    "Gop/s": lambda row: f"{achieved_flops(row[1]) / 1e9:.1f}",
                    "of attainable": lambda row: f"{attained_share(*row, limits):.0%}",
                },
                text_columns=2,
            )
        ]

    def findings(self, record: RooflineRecord) -> Sequence[Finding | str]:
        return [
            *(f for layer in record["roofs"] for f in _roofline_findings(layer, record["limits"])),
            *record["skipped"],
            *timing.load_warnings(record["machine"]),
        ]


def measure_roofline(
    context: StudyContext,
    bench: BenchLayer,
    limits: timing.DeviceLimits,
    *,
    on_progress: ProgressCallback,
    pace: timing.TimingBudget = timing.FULL_BUDGET,
) -> LayerRoofline:
    """Route blocks of every size under every policy, time the experts, count operations."""
    runs: dict[tuple[str, int], RoutedBlocks] = {}
    for tokens in TOKEN_COUNTS:
        scored_blocks = make_blocks(context, bench, tokens)
        for policy in POLICIES if scored_blocks else ():
            runs[policy, tokens] = route_blocks(bench, scored_blocks, policy)
    rounds = pace.rounds or ROUNDS[bench.random]
    callables = {key: block.run for key, block in runs.items()}
    timings = timing.time_interleaved(
        callables, rounds, device=bench.device, on_progress=on_progress
    )
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
    peak = limits["flops_per_second"][timing.dtype_name(bench.tokens_dtype)]
    return LayerRoofline(bench=bench.to_info(), peak=peak, points=points)


def attainable_flops(intensity: float, peak: float, bytes_per_second: float) -> float:
    """Operations per second under the roof."""
    return min(peak, intensity * bytes_per_second)


def achieved_flops(point: RooflinePoint) -> float:
    """Operations per second as measured."""
    return point["flops"] / point["seconds"]["median"]


def read_bytes(layer: LayerRoofline, point: RooflinePoint) -> float:
    return point["used"] * layer["bench"]["expert_bytes"]


def attained_share(
    layer: LayerRoofline, point: RooflinePoint, limits: timing.DeviceLimits
) -> float:
    """The measured rate as a share of the roof."""
    read = limits["bytes_per_second"]
    return achieved_flops(point) / attainable_flops(point["intensity"], layer["peak"], read)


def reading_share(points: Sequence[RooflinePoint], point: RooflinePoint) -> float:
    """The share of a point's time that is proportional to its unique experts.

    It comes from the fit of Equation 2 through all points of the layer.
    """
    fit = timing.fit_latency(
        [entry["used"] for entry in points],
        [entry["pairs"] for entry in points],
        [entry["seconds"]["median"] for entry in points],
    )
    total = timing.predict_seconds(fit, point["used"], point["pairs"])
    return min(1.0, max(0.0, fit["b"] * point["used"] / total))


def _draw(layer: LayerRoofline, limits: timing.DeviceLimits) -> Figure:
    figure, ax = new_axes("operations per byte read", "billion operations per second")
    read, peak = limits["bytes_per_second"], layer["peak"]
    intensities = [point["intensity"] for point in layer["points"]]
    left, right = min(intensities) / 2, max(4 * peak / read, 2 * max(intensities))
    corners = (left, peak / read, right)
    roof = [attainable_flops(intensity, peak, read) / 1e9 for intensity in corners]
    ax.plot(corners, roof, color=foreground(), linewidth=1.2)
    for policy, alpha in zip(POLICIES, LINE_ALPHAS, strict=True):
        points = [point for point in layer["points"] if point["policy"] == policy]
        xs = [point["intensity"] for point in points]
        ys = [achieved_flops(point) / 1e9 for point in points]
        draw_series(ax, policy_series(policy, xs, ys, alpha=alpha))
        for x, y, point in zip(xs, ys, points, strict=True) if policy == VANILLA else ():
            ax.annotate(f"{point['tokens']}", (x, y), xytext=(-5, 4), textcoords="offset points",
                        ha="right", fontsize=8.5)  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=(left, right))
    ax.grid(which="minor", visible=False)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_formatter("{x:g}")
    add_legend(ax)
    return figure


def _roofline_findings(layer: LayerRoofline, limits: timing.DeviceLimits) -> list[Finding]:
    at_block = {p["policy"]: p for p in layer["points"] if p["tokens"] == BLOCK_LENGTH}
    if VANILLA not in at_block:
        return []
    vanilla, coreset = at_block[VANILLA], at_block["des-vote:beta=0.15"]
    ridge = layer["peak"] / limits["bytes_per_second"]
    reading, name = reading_share(layer["points"], vanilla), layer_description(layer["bench"])
    overhead = (
        "; the overhead of many small operations bounds it, not memory"
        if reading < MIN_READING_SHARE
        else ""
    )
    return [
        judge(
            f"With {BLOCK_LENGTH} tokens, {name} makes {vanilla['intensity']:.1f} operations per "
            f"byte; arithmetic bounds this machine above {ridge:.1f}. It reaches "
            f"{attained_share(layer, vanilla, limits):.0%} of the rate that the memory bandwidth "
            f"allows, and {reading:.0%} of its time is proportional to the experts "
            f"read{overhead}.",
            "Memory, not arithmetic, bounds the MoE layer of a parallel decoder.",
            vanilla["intensity"] < ridge and reading >= MIN_READING_SHARE,
        ),
        judge(
            f"Under {coreset['policy']} {name} reads {coreset['used']:.0f} experts instead of "
            f"{vanilla['used']:.0f}: {coreset['intensity']:.1f} operations per byte instead of "
            f"{vanilla['intensity']:.1f}, and "
            f"{achieved_flops(coreset) / achieved_flops(vanilla):.2f} times as many per second.",
            "A coreset raises the operations per byte read, so the layer runs faster.",
            coreset["seconds"]["high"] < vanilla["seconds"]["low"],
        ),
    ]
