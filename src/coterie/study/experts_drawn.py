"""How experts that do not fit are drawn: accuracy against bytes, and hits against memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from coterie.figures.style import (
    BLUE,
    BROWN,
    FUCHSIA,
    GREEN,
    GREY,
    INDIGO,
    OLIVE,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    TEAL,
    axes,
    ink,
    panels,
    percent,
)
from coterie.study.chapter import Drawing
from coterie.study.curves import wilson
from coterie.study.experts_facts import SHARES, Grid, Point
from coterie.study.experts_told import commits_of, share_said
from coterie.study.table import readable

MARKS: Mapping[str, str] = dict(zip(SHARES, "so^vD", strict=True))
BYTES = "bytes of experts moved, an answer"
COLOURS = (GREY, BLUE, ORANGE, GREEN, PURPLE, TEAL, RED, PINK, BROWN, INDIGO, OLIVE, FUCHSIA)
TICKS = (0.0, 0.5, 0.9, 0.99, 0.999)  # of right answers, where what is wrong sets the scale
FLOOR = 2e-4  # wrong; less looks the same


def drawings(facts: Mapping[str, object]) -> list[Drawing]:
    grid = Grid.of(facts)
    found = [
        Drawing(
            "experts-bytes",
            "Right answers, with 95 % Wilson intervals, against the bytes of experts that an "
            "answer moves, one panel a precision. A line is a policy, a marker the share of the "
            "experts in memory (with all of them there nothing moves but once); further left and "
            "higher is better. The scale is that of wrong answers.",
            lambda: draw_bytes(grid),
        ),
        Drawing(
            "experts-hits",
            f"Experts used that were in memory ({grid.first}), by the share of the experts that "
            "memory has room for; LRU.",
            lambda: draw_hits(grid),
        ),
    ]
    if grid.found["commits"]:
        found.append(
            Drawing(
                "experts-commits",
                f"The same at {share_said(grid.found['main'])} in memory ({grid.first}), with "
                "blocks committed by the policy and by vanilla. Open markers: policies that "
                "prefer residents.",
                lambda: draw_commits(grid),
            )
        )
    return found


def draw_bytes(grid: Grid) -> Figure:
    names = [one["name"] for one in grid.found["precisions"]]
    figure, many = panels(len(names), columns=1, height=2.6)
    looks = colours(grid)
    for one, name in zip(many, names, strict=True):
        moving = [point for point in grid.at(name) if point.kept["share"] != SHARES[0]]
        for policy, points in lines(moving):
            one.plot([p.bytes for p in points], rights(points), color=looks[policy], lw=1.1)
            for point in points:
                mark(one, point, MARKS[point.kept["share"]], looks[policy])
        by_wrong(one)
        in_bytes(one)
        one.set_ylabel(f"right, {name}")
    many[-1].set_xlabel(BYTES)
    keyed(many[0], looks, {share: MARKS[share] for share in SHARES[1:]})
    return figure


def draw_hits(grid: Grid) -> Figure:
    figure, one = axes("share of the experts in memory", "found there", height=4.2)
    looks = colours(grid)
    for policy, points in lines(grid.at(grid.first)):
        shares = [float(p.kept["share"].rstrip("%")) / 100 for p in points]
        rates = [p.hit_rate for p in points]
        one.plot(shares, rates, color=looks[policy], marker="o", ms=4, lw=1.1)
    one.plot([0, 1], [0, 1], color=ink(), lw=0.7, ls=(0, (1, 3)))
    one.set(xlim=(0, 1.02), ylim=(0, 1.02))
    percent(one)
    percent(one, axis="x")
    keyed(one, looks, {})
    return figure


def draw_commits(grid: Grid) -> Figure:
    kinds = commits_of(grid)
    figure, many = panels(len(kinds), columns=1, height=2.6)
    looks = colours(grid)
    for one, commit in zip(many, kinds, strict=True):
        for point in grid.at(grid.first, grid.found["main"], commit):
            mark(one, point, "o", looks[point.policy], hollow=point.run["looks"])
        by = "the policy" if commit == "policy" else "vanilla"
        one.set_ylabel(f"right, commits by {by}")
        by_wrong(one)
        in_bytes(one)
    ends = [end for one in many for end in one.get_xlim()]
    for one in many:
        one.set_xlim(0, max(ends))
    many[-1].set_xlabel(BYTES)
    keyed(many[0], looks, {})
    return figure


def lines(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    """Each policy's, from the largest memory to the smallest."""
    order = sorted(points, key=lambda p: (p.policy, SHARES.index(p.kept["share"])))
    return [(policy, list(of)) for policy, of in groupby(order, key=lambda p: p.policy)]


def rights(points: Sequence[Point]) -> list[float]:
    return [point.tally.accuracy for point in points]


def mark(one: Axes, point: Point, marker: str, colour: str, *, hollow: bool = False) -> None:
    """One point with its Wilson interval."""
    one.errorbar(
        [point.bytes], [point.tally.accuracy], yerr=wilson([point.tally]), color=colour,
        marker=marker, ms=5, elinewidth=0.7, capsize=0, ls="",
        markerfacecolor="none" if hollow else colour,
        clip_on=False,  # who errs nowhere sits on the upper edge
    )  # fmt: skip


def colours(grid: Grid) -> dict[str, str]:
    """Of every policy, by its place."""
    policies = dict.fromkeys(point.policy for point in grid.points)
    return {policy: COLOURS[place % len(COLOURS)] for place, policy in enumerate(policies)}


def by_wrong(one: Axes) -> None:
    """A scale on which 99 % right lies as far above 90 % as 99.9 % above 99 %."""

    def up(right: np.ndarray) -> np.ndarray:
        return -np.log10(np.clip(1 - np.asarray(right), FLOOR, None))

    def down(place: np.ndarray) -> np.ndarray:
        return 1 - 10 ** -np.asarray(place)

    one.set_yscale("function", functions=(up, down))
    one.set(ylim=(0.0, 1 - FLOOR), yticks=TICKS, yticklabels=[f"{tick:.1%}" for tick in TICKS])
    one.yaxis.set_minor_locator(NullLocator())


def in_bytes(one: Axes) -> None:
    one.set_xlim(0, None)
    one.xaxis.set_major_locator(MaxNLocator(6))
    one.xaxis.set_major_formatter(lambda value, _: readable(value))


def keyed(one: Axes, looks: Mapping[str, str], marks: Mapping[str, str]) -> None:
    """The policies, and the shares, above the axes."""
    handles = [Line2D([], [], color=colour, label=policy) for policy, colour in looks.items()]
    handles += [
        Line2D([], [], color=ink(), marker=marker, ls="", label=share_said(share))
        for share, marker in marks.items()
    ]
    shown = one.legend(handles=handles, ncols=2, loc="lower left", fontsize=6.5)
    shown.set_bbox_to_anchor((0, 1.0), transform=one.transAxes)
