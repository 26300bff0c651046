"""Latency against experts (Fig. 2, right), and how well Equation 2 tells it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.bench.routings import BLOCK, controlled
from coterie.bench.shapes import LARGE, Shape
from coterie.bench.timing import (
    FULL,
    Conditions,
    Fit,
    Limits,
    Pace,
    Spread,
    conditions,
    crowded,
    fit,
    in_turns,
    limits,
    on,
    predicted,
)
from coterie.figures.style import SERIES, axes, ink, legend
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.lab import Lab
from coterie.study.layers import Bench, BenchFacts, Tell, at_each, called
from coterie.study.routings import TURNS, blocks, turning, under

TOKENS = (8, 16, 32, 64)
SIZES = (8, 12, 19, 25, 38, 51, 64, 84, 112, 128, 163, 200, 256)  # unique experts that are tried
ROUNDS = {False: 40, True: 8}  # of the model's own small layer, of a large one
CHECKED = ("vanilla", "des-seq:k=3", "des-vote:beta=0.3", "des-vote:beta=0.15")
MARKERS = ("o", "s", "D", "^")
STRAIGHT = 0.95  # R^2 from which Equation 2 is said to hold


class Point(TypedDict):
    """``tokens`` that use exactly ``used`` experts, ``pairs`` token-expert pairs."""

    tokens: int
    used: int
    pairs: int
    seconds: Spread


class Check(TypedDict):
    """A block as a router would route it, held against what the fit says of it."""

    policy: str
    used: float
    pairs: float
    seconds: Spread
    predicted: float


class Line(TypedDict):
    """One layer: its size, what was measured, and the line through it.

    ``read`` is the bandwidth that ``b`` amounts to, in bytes a second; None where b is not above 0.
    """

    bench: BenchFacts
    points: list[Point]
    fit: Fit
    read: float | None
    checks: list[Check]


class Found(TypedDict):
    machine: Conditions
    limits: Limits
    lines: list[Line]
    skipped: list[str]


@dataclass(frozen=True)
class Latency:
    """Layers timed in turns with experts and tokens set, and a plane laid through the times."""

    name: str = "latency"
    title: str = "Latency against experts (Fig. 2, right)"
    question: str = (
        "Is the time of a layer of experts set by how many different experts it reads, "
        "or by how many words pass through it?"
    )

    shapes: Sequence[Shape] = LARGE
    pace: Pace = FULL

    def measure(self, lab: Lab) -> Facts:
        lab.tell(0.0, "how fast this machine reads and multiplies")
        device = lab.engine.model.transformer.device
        dtypes = {lab.engine.model.transformer.dtype, *(shape.dtype for shape in self.shapes)}
        roof = limits(device, dtypes, self.pace)
        lines, skipped = at_each(
            lab, self.shapes, lambda bench, tell: line(lab, bench, tell=tell, pace=self.pace)
        )
        return cast(
            "Facts", Found(machine=conditions(device), limits=roof, lines=lines, skipped=skipped)
        )

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        found = cast("Found", facts)
        return [
            Drawing(
                f"{self.name}-{number}",
                f"The experts of {called(one['bench'])}: time against the unique experts that are "
                "read, for different numbers of tokens. Lines are the fit of Equation 2, bars span "
                "the quartiles.",
                lambda one=one: _draw(one),
            )
            for number, one in enumerate(found["lines"])
        ]

    def tables(self, facts: Facts) -> Sequence[Table]:
        found = cast("Found", facts)
        return [_fits(found), *(_checks(one) for one in found["lines"] if one["checks"])]

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        found = cast("Found", facts)
        read = found["limits"]["bytes_per_second"]
        lines = found["lines"]
        told = [*map(_straight, lines), *(_reading(one, read) for one in lines if one["checks"])]
        return [*told, *found["skipped"], *crowded(found["machine"])]


def line(lab: Lab, bench: Bench, *, tell: Tell, pace: Pace = FULL) -> Line:
    """Measure a layer over a grid of tokens and experts, and fit it."""
    rounds = pace.rounds or ROUNDS[bench.random]
    draw = torch.Generator().manual_seed(0)
    grid = {
        (tokens, used): _set(bench, tokens, used, draw)
        for tokens in TOKENS
        for used in sorted({bench.router.k, *SIZES, bench.router.experts})
        if bench.router.k <= used <= min(tokens * bench.router.k, bench.router.experts)
    }
    here = blocks(lab, bench, BLOCK)
    checks = {policy: under(bench, here, policy) for policy in CHECKED} if here else {}
    works = {**grid, **{policy: routed.work for policy, routed in checks.items()}}
    taken = in_turns(works, rounds, device=bench.device, tell=tell)
    points = [
        Point(tokens=tokens, used=used, pairs=tokens * bench.router.k, seconds=taken[tokens, used])
        for tokens, used in grid
    ]
    found = fit_points(points)
    return Line(
        bench=bench.facts(),
        points=points,
        fit=found,
        read=bench.expert_bytes / found["b"] if found["b"] > 0 else None,
        checks=[
            Check(
                policy=policy,
                used=routed.used,
                pairs=routed.pairs,
                seconds=taken[policy],
                predicted=predicted(found, routed.used, routed.pairs),
            )
            for policy, routed in checks.items()
        ],
    )


def fit_points(points: Sequence[Point]) -> Fit:
    """Through the medians."""
    return fit(
        [point["used"] for point in points],
        [point["pairs"] for point in points],
        [point["seconds"]["median"] for point in points],
    )


def _set(bench: Bench, tokens: int, used: int, draw: torch.Generator) -> Callable[[], object]:
    routings = [
        controlled(bench.router, tokens, used, draw, bench.device)
        for _ in range(max(TURNS, len(bench.slabs)))
    ]
    return turning(bench, [bench.inputs(tokens, draw) for _ in routings], routings)


def _draw(one: Line) -> Figure:
    figure, plot = axes(f"unique experts of {one['bench']['experts']}", "milliseconds")
    for tokens, paint, marker in zip(TOKENS, SERIES, MARKERS, strict=False):
        points = [point for point in one["points"] if point["tokens"] == tokens]
        if points:
            _draw_tokens(plot, one["fit"], points, color=paint, marker=marker)
    for check in one["checks"]:
        taken = check["seconds"]["median"] * 1e3
        plot.plot(
            check["used"], taken, marker="x", color=ink(), linestyle="", label="routed blocks of 32"
        )
    slowest = max(point["seconds"]["median"] for point in one["points"])
    plot.set(xlim=(0, None), ylim=(0, 1.25e3 * slowest))
    legend(plot, columns=3)
    return figure


def _draw_tokens(
    plot: Axes, found: Fit, points: Sequence[Point], *, color: str, marker: str
) -> None:
    used = [point["used"] for point in points]
    taken = [point["seconds"] for point in points]
    middle = [each["median"] * 1e3 for each in taken]
    below = [(each["median"] - each["low"]) * 1e3 for each in taken]
    above = [(each["high"] - each["median"]) * 1e3 for each in taken]
    label = f"{points[0]['tokens']} tokens"
    plot.errorbar(
        used, middle, yerr=[below, above], fmt=marker, color=color, label=label, elinewidth=1
    )
    ends = (min(used), max(used))
    told = [predicted(found, end, points[0]["pairs"]) * 1e3 for end in ends]
    plot.plot(ends, told, color=color, linewidth=1)


def _fits(found: Found) -> Table:
    rows = []
    for one in found["lines"]:
        line, bench = one["fit"], one["bench"]
        rows.append(
            [
                bench["name"] + (" (random)" if bench["random"] else ""),
                f"{bench['experts']} x 3 x {bench['hidden']} x {bench['width']} {bench['dtype']}",
                f"{line['t0'] * 1e3:.3f}",
                f"{line['b'] * 1e6:.2f}",
                f"{line['a'] * 1e6:.3f}",
                f"{line['r2']:.4f}",
                f"{line['error']:.1%}",
                "" if one["read"] is None else f"{one['read'] / 1e9:.1f}",
            ]
        )
    roof = found["limits"]
    return Table(
        heads=["layer", "experts", "t0, ms", "b, us", "a, us", "R2", "median error", "GB/s by b"],
        rows=rows,
        caption="t = t0 + b T + a N K, least squares over the medians of all points. "
        f"This machine reads {roof['bytes_per_second'] / 1e9:.1f} GB/s ({roof['reader']}, "
        f"{on(found['machine'])}).",
        numbers=list(range(2, 8)),
    )


def _checks(one: Line) -> Table:
    how = "routed by a skewed router" if one["bench"]["random"] else "as they come in decoding"
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
            for check in one["checks"]
        ],
        caption=f"Blocks of {BLOCK}, {how}, through the experts of {called(one['bench'])}; the "
        "fit saw none of these.",
        numbers=[1, 2, 3, 4],
    )


def _straight(one: Line) -> Finding:
    line = one["fit"]
    name = called(one["bench"])
    return Finding(
        f"{name[0].upper()}{name[1:]}: each unique expert costs {line['b'] * 1e6:.1f} us, "
        f"each token's use of one {line['a'] * 1e6:.2f} us, and {line['t0'] * 1e3:.2f} ms go "
        f"whatever is read; R2 is {line['r2']:.3f}, the fit is off by {line['error']:.1%} at the "
        "median.",
        claim="Equation 2: the latency of a MoE layer is linear in its unique experts.",
        verdict="holds" if line["r2"] >= STRAIGHT and line["b"] > 0 else "does not hold",
    )


def _reading(one: Line, read: float) -> Finding:
    plain = next(check for check in one["checks"] if check["policy"] == CHECKED[0])
    share = one["fit"]["b"] * plain["used"] / plain["predicted"]
    rate = ""
    if one["read"] is not None:
        rate = f" b amounts to {one['read'] / 1e9:.1f} GB/s, {one['read'] / read:.0%} of what this"
        rate += " machine reads at best"
        rate += ": they come out of its caches." if one["read"] > read else "."
    return Finding(
        f"Of a vanilla block of {BLOCK}, which uses {plain['used']:.0f} experts of "
        f"{called(one['bench'])}, {share:.0%} of the time goes with the experts read.{rate}",
        claim="Reading experts is what a MoE layer's time goes into.",
        verdict="holds" if share >= 0.5 else "does not hold",
    )
