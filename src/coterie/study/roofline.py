"""The roofline of the MoE layer (Fig. 1b): what it does for each byte it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypedDict, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.bench.routings import BLOCK
from coterie.bench.shapes import LARGE, Shape
from coterie.bench.timing import (
    FULL,
    Conditions,
    Limits,
    Pace,
    Spread,
    conditions,
    crowded,
    fit,
    in_turns,
    limits,
    name,
    on,
    predicted,
)
from coterie.figures.style import axes, ink, legend, look
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.lab import Lab
from coterie.study.layers import Bench, BenchFacts, Tell, at_each, called
from coterie.study.routings import Routed, blocks, under

TOKENS = (1, 8, 16, 32, 64)
VANILLA = "vanilla"
POLICIES = (VANILLA, "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
SHADES = (1.0, 1.0, 0.55, 1.0)  # the two sizes of one policy
ROUNDS = {False: 30, True: 6}  # for the model's own small layer, for a large one
MOST = 2 / 3  # of the time: below it, what is read does not bind a layer


class Point(TypedDict):
    """The experts of one forward: ``tokens`` positions, ``used`` unique experts on average,
    ``pairs`` of a token and an expert. ``intensity``: operations for each byte of experts read.
    """

    policy: str
    tokens: int
    used: float
    pairs: float
    intensity: float
    flops: float
    seconds: Spread


class Roof(TypedDict):
    """One layer under its roof: ``peak`` in operations a second, in the layer's dtype."""

    bench: BenchFacts
    peak: float
    points: list[Point]


class Found(TypedDict):
    machine: Conditions
    limits: Limits
    roofs: list[Roof]
    skipped: list[str]


@dataclass(frozen=True)
class Roofline:
    """Bytes are counted from the experts used, operations from the token-expert pairs; both roofs
    and every point's rate are measured."""

    name: str = "roofline"
    title: str = "The roofline of the MoE layer (Fig. 1b)"
    question: str = (
        "A processor can read so many bytes and make so many operations a second. "
        "Which of the two holds a layer of experts back, and what does a coreset change?"
    )

    shapes: Sequence[Shape] = LARGE
    pace: Pace = FULL

    def measure(self, lab: Lab) -> Facts:
        lab.tell(0.0, "how fast this machine reads and multiplies")
        own = lab.engine.model.transformer
        dtypes = {own.dtype, *(shape.dtype for shape in self.shapes)}
        found = limits(own.device, dtypes, self.pace)

        roofs, skipped = at_each(
            lab,
            self.shapes,
            lambda bench, tell: roof(lab, bench, found, tell=tell, pace=self.pace),
        )
        return cast(
            "Facts",
            Found(machine=conditions(own.device), limits=found, roofs=roofs, skipped=skipped),
        )

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        return [
            Drawing(
                f"{self.name}-{number}",
                f"The experts of {called(one['bench'])}: operations a second against operations "
                f"per byte of experts read, with {_listed(one)} tokens from left to right. The "
                "line is what this machine could do at best.",
                lambda one=one: _draw(one, found["limits"]),
            )
            for number, one in enumerate(found["roofs"])
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        best = found["limits"]
        heads = ["layer", "policy", "experts", "MB read", "op/byte", "ms", "Gop/s", "of attainable"]
        peaks = sorted(best["flops_per_second"].items())
        told = ", ".join(f"{peak / 1e9:.0f} in {dtype}" for dtype, peak in peaks)
        return [
            Table(
                heads=heads,
                rows=[
                    _row(one, point, best)
                    for one in found["roofs"]
                    for point in one["points"]
                    if point["tokens"] == BLOCK
                ],
                caption=f"With {BLOCK} tokens. At best ({on(found['machine'])}) this "
                f"machine reads {best['bytes_per_second'] / 1e9:.1f} GB/s ({best['reader']}) "
                f"and makes so many billion operations a second: {told}.",
                numbers=list(range(2, len(heads))),
            )
        ]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        told = [_told(one, found["limits"]) for one in found["roofs"]]
        return [*chain.from_iterable(told), *found["skipped"], *crowded(found["machine"])]


def roof(lab: Lab, bench: Bench, found: Limits, *, tell: Tell, pace: Pace = FULL) -> Roof:
    """Route blocks of every size under every policy, time the experts, count what they do."""
    works: dict[tuple[str, int], Routed] = {}
    for tokens in TOKENS:
        here = blocks(lab, bench, tokens)
        for policy in POLICIES if here else ():
            works[policy, tokens] = under(bench, here, policy)
    rounds = pace.rounds or ROUNDS[bench.random]
    each = {key: routed.work for key, routed in works.items()}
    taken = in_turns(each, rounds, device=bench.device, tell=tell)
    points = [
        Point(
            policy=policy,
            tokens=tokens,
            used=routed.used,
            pairs=routed.pairs,
            intensity=bench.flops(routed.pairs) / (routed.used * bench.expert_bytes),
            flops=bench.flops(routed.pairs),
            seconds=taken[policy, tokens],
        )
        for (policy, tokens), routed in works.items()
    ]
    peak = found["flops_per_second"][name(bench.tokens_dtype)]
    return Roof(bench=bench.facts(), peak=peak, points=points)


def attainable(intensity: float, peak: float, bytes_per_second: float) -> float:
    """Operations a second under the roof."""
    return min(peak, intensity * bytes_per_second)


def _draw(one: Roof, found: Limits) -> Figure:
    figure, plot = axes("operations per byte read", "billion operations a second")
    read, peak = found["bytes_per_second"], one["peak"]
    intensities = [point["intensity"] for point in one["points"]]
    left, right = min(intensities) / 2, max(4 * peak / read, 2 * max(intensities))
    bend = peak / read
    roofline = [attainable(at, peak, read) / 1e9 for at in (left, bend, right)]
    plot.plot((left, bend, right), roofline, color=ink(), linewidth=1.2)
    for policy, shade in zip(POLICIES, SHADES, strict=True):
        points = [point for point in one["points"] if point["policy"] == policy]
        _draw_policy(plot, policy, points, shade)
    plot.set(xscale="log", yscale="log", xlim=(left, right))
    plot.grid(which="minor", visible=False)
    plot.xaxis.set_major_formatter("{x:g}")
    plot.yaxis.set_major_formatter("{x:g}")
    legend(plot)
    return figure


def _draw_policy(plot: Axes, policy: str, points: Sequence[Point], shade: float) -> None:
    xs = [point["intensity"] for point in points]
    ys = [point["flops"] / point["seconds"]["median"] / 1e9 for point in points]
    plot.plot(
        xs,
        ys,
        color=look(policy).colour,
        marker=look(policy).marker,
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


def _row(one: Roof, point: Point, found: Limits) -> list[str]:
    bench, rate = one["bench"], point["flops"] / point["seconds"]["median"]
    best = attainable(point["intensity"], one["peak"], found["bytes_per_second"])
    return [
        bench["name"] + (" (random)" if bench["random"] else ""),
        point["policy"],
        f"{point['used']:.1f}",
        f"{point['used'] * bench['expert_bytes'] / 1e6:.2f}",
        f"{point['intensity']:.2f}",
        f"{point['seconds']['median'] * 1e3:.2f}",
        f"{rate / 1e9:.1f}",
        f"{rate / best:.0%}",
    ]


def reading_share(points: Sequence[Point], point: Point) -> float:
    """Share of a point's time that goes with its unique experts, by the fit of Equation 2 through
    all points of its layer."""
    line = fit(
        [each["used"] for each in points],
        [each["pairs"] for each in points],
        [each["seconds"]["median"] for each in points],
    )
    whole = predicted(line, point["used"], point["pairs"])
    return min(1.0, max(0.0, line["b"] * point["used"] / whole))


def _told(one: Roof, found: Limits) -> list[Finding]:
    at = {point["policy"]: point for point in one["points"] if point["tokens"] == BLOCK}
    if VANILLA not in at:
        return []
    plain, ridge = at[VANILLA], one["peak"] / found["bytes_per_second"]
    best = attainable(plain["intensity"], one["peak"], found["bytes_per_second"])
    share = plain["flops"] / plain["seconds"]["median"] / best
    reading = reading_share(one["points"], plain)
    name = called(one["bench"])
    text = (
        f"With {BLOCK} tokens, {name} makes {plain['intensity']:.1f} operations per byte; this "
        f"machine needs {ridge:.1f} before arithmetic holds it back. It reaches {share:.0%} of "
        f"what its reading rate would allow, and {reading:.0%} of the time goes with the experts "
        "that are read"
    )
    if reading < MOST:
        text += ": it is bound by the overhead of many small operations, not by memory"
    low = plain["intensity"] < ridge
    return [
        Finding(
            f"{text}.",
            claim="The MoE layer of a parallel decoder is bound by memory, not by arithmetic.",
            verdict="holds" if low and reading >= MOST else "does not hold",
        ),
        _moved(plain, at["des-vote:beta=0.15"], name),
    ]


def _moved(plain: Point, small: Point, name: str) -> Finding:
    before, after = (p["flops"] / p["seconds"]["median"] for p in (plain, small))
    return Finding(
        f"Under {small['policy']} {name} reads {small['used']:.0f} experts in place of "
        f"{plain['used']:.0f}: {small['intensity']:.1f} operations per byte in place of "
        f"{plain['intensity']:.1f}, and {after / before:.2f} times as many a second.",
        claim="A coreset makes more of every byte read, so the layer runs faster.",
        verdict="holds" if small["seconds"]["high"] < plain["seconds"]["low"] else "does not hold",
    )


def _listed(one: Roof) -> str:
    tokens = sorted({point["tokens"] for point in one["points"]})
    return ", ".join(map(str, tokens))
