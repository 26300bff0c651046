"""How experts that do not fit are drawn: accuracy against bytes, and hits against memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from coterie.lab.plotting import (
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
    foreground,
    format_percent,
    new_axes,
    new_panels,
)
from coterie.lab.study.curves import wilson
from coterie.lab.study.experiment import Drawing
from coterie.lab.study.experts_facts import MEMORY_SHARES, CachePoint, ResultGrid
from coterie.lab.study.experts_told import commit_kinds, format_share
from coterie.lab.study.table import format_bytes

SHARE_MARKERS: Mapping[str, str] = dict(zip(MEMORY_SHARES, "so^vD", strict=True))
BYTES_LABEL = "bytes of experts moved, an answer"
COLORS = (GREY, BLUE, ORANGE, GREEN, PURPLE, TEAL, RED, PINK, BROWN, INDIGO, OLIVE, FUCHSIA)
ACCURACY_TICKS = (
    0.0,
    0.5,
    0.9,
    0.99,
    0.999,
)  # of right answers, where what is wrong sets the scale
MIN_ERROR_RATE = 2e-4  # wrong; less looks the same


def cache_drawings(data: Mapping[str, object]) -> list[Drawing]:
    grid = ResultGrid.from_data(data)
    drawings_list = [
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
            f"Experts used that were in memory ({grid.baseline_precision}), by the share of the experts that "
            "memory has room for; LRU.",
            lambda: draw_hits(grid),
        ),
    ]
    if grid.record["commits"]:
        drawings_list.append(
            Drawing(
                "experts-commits",
                f"The same at {format_share(grid.record['main'])} in memory ({grid.baseline_precision}), with "
                "blocks committed by the policy and by vanilla. Open markers: policies that "
                "prefer residents.",
                lambda: draw_commits(grid),
            )
        )
    return drawings_list


def draw_bytes(grid: ResultGrid) -> Figure:
    names = [ax["name"] for ax in grid.record["precisions"]]
    figure, subplots = new_panels(len(names), columns=1, height=2.6)
    colors = policy_colors(grid)
    for ax, name in zip(subplots, names, strict=True):
        partial = [
            point for point in grid.select(name) if point.outcome["share"] != MEMORY_SHARES[0]
        ]
        for policy, points in points_by_policy(partial):
            ax.plot([p.bytes for p in points], accuracies(points), color=colors[policy], lw=1.1)
            for point in points:
                draw_point(ax, point, SHARE_MARKERS[point.outcome["share"]], colors[policy])
        set_error_scale(ax)
        set_bytes_axis(ax)
        ax.set_ylabel(f"right, {name}")
    subplots[-1].set_xlabel(BYTES_LABEL)
    add_policy_legend(
        subplots[0], colors, {share: SHARE_MARKERS[share] for share in MEMORY_SHARES[1:]}
    )
    return figure


def draw_hits(grid: ResultGrid) -> Figure:
    figure, ax = new_axes("share of the experts in memory", "found there", height=4.2)
    colors = policy_colors(grid)
    for policy, points in points_by_policy(grid.select(grid.baseline_precision)):
        shares = [float(p.outcome["share"].rstrip("%")) / 100 for p in points]
        rates = [p.hit_rate for p in points]
        ax.plot(shares, rates, color=colors[policy], marker="o", ms=4, lw=1.1)
    ax.plot([0, 1], [0, 1], color=foreground(), lw=0.7, ls=(0, (1, 3)))
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02))
    format_percent(ax)
    format_percent(ax, axis="x")
    add_policy_legend(ax, colors, {})
    return figure


def draw_commits(grid: ResultGrid) -> Figure:
    kinds = commit_kinds(grid)
    figure, subplots = new_panels(len(kinds), columns=1, height=2.6)
    colors = policy_colors(grid)
    for ax, commit in zip(subplots, kinds, strict=True):
        for point in grid.select(grid.baseline_precision, grid.record["main"], commit):
            draw_point(ax, point, "o", colors[point.policy], hollow=point.run["looks"])
        by = "the policy" if commit == "policy" else "vanilla"
        ax.set_ylabel(f"right, commits by {by}")
        set_error_scale(ax)
        set_bytes_axis(ax)
    ends = [end for ax in subplots for end in ax.get_xlim()]
    for ax in subplots:
        ax.set_xlim(0, max(ends))
    subplots[-1].set_xlabel(BYTES_LABEL)
    add_policy_legend(subplots[0], colors, {})
    return figure


def points_by_policy(points: Sequence[CachePoint]) -> list[tuple[str, list[CachePoint]]]:
    """Each policy's, from the largest memory to the smallest."""
    order = sorted(points, key=lambda p: (p.policy, MEMORY_SHARES.index(p.outcome["share"])))
    return [(policy, list(group)) for policy, group in groupby(order, key=lambda p: p.policy)]


def accuracies(points: Sequence[CachePoint]) -> list[float]:
    return [point.result.accuracy for point in points]


def draw_point(
    ax: Axes, point: CachePoint, marker: str, colour: str, *, hollow: bool = False
) -> None:
    """One point with its Wilson interval."""
    ax.errorbar(
        [point.bytes], [point.result.accuracy], yerr=wilson([point.result]), color=colour,
        marker=marker, ms=5, elinewidth=0.7, capsize=0, ls="",
        markerfacecolor="none" if hollow else colour,
        clip_on=False,  # who errs nowhere sits on the upper edge
    )  # fmt: skip


def policy_colors(grid: ResultGrid) -> dict[str, str]:
    """Of every policy, by its place."""
    policies = dict.fromkeys(point.policy for point in grid.points)
    return {policy: COLORS[index % len(COLORS)] for index, policy in enumerate(policies)}


def set_error_scale(ax: Axes) -> None:
    """A scale on which 99 % right lies as far above 90 % as 99.9 % above 99 %."""

    def to_scale(right: np.ndarray) -> np.ndarray:
        return -np.log10(np.clip(1 - np.asarray(right), MIN_ERROR_RATE, None))

    def from_scale(position: np.ndarray) -> np.ndarray:
        return 1 - 10 ** -np.asarray(position)

    ax.set_yscale("function", functions=(to_scale, from_scale))
    ax.set(
        ylim=(0.0, 1 - MIN_ERROR_RATE),
        yticks=ACCURACY_TICKS,
        yticklabels=[f"{tick:.1%}" for tick in ACCURACY_TICKS],
    )
    ax.yaxis.set_minor_locator(NullLocator())


def set_bytes_axis(ax: Axes) -> None:
    ax.set_xlim(0, None)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(lambda value, _: format_bytes(value))


def add_policy_legend(ax: Axes, colors: Mapping[str, str], marks: Mapping[str, str]) -> None:
    """The policies, and the shares, above the axes."""
    handles = [Line2D([], [], color=colour, label=policy) for policy, colour in colors.items()]
    handles += [
        Line2D([], [], color=foreground(), marker=marker, ls="", label=format_share(share))
        for share, marker in marks.items()
    ]
    shown = ax.legend(handles=handles, ncols=2, loc="lower left", fontsize=6.5)
    shown.set_bbox_to_anchor((0, 1.0), transform=ax.transAxes)
