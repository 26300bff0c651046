"""Figures of the expert-cache experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from coterie.lab import plotting
from coterie.lab.plotting import SeriesStyle, foreground, format_percent, new_axes, new_panels
from coterie.lab.study.charts import Series, draw_guide, draw_series
from coterie.lab.study.experiment import decimal_bytes
from coterie.lab.study.expert_cache import MEMORY_SHARES, CachePoint, ResultGrid, format_share

SHARE_MARKERS: Mapping[str, str] = dict(zip(MEMORY_SHARES, "so^vD", strict=True))
BYTES_LABEL = "bytes of experts moved per answer"
COLOURS = (
    *(plotting.GREY, plotting.BLUE, plotting.ORANGE, plotting.GREEN, plotting.PURPLE),
    *(plotting.TEAL, plotting.RED, plotting.PINK, plotting.BROWN, plotting.INDIGO),
    *(plotting.OLIVE, plotting.FUCHSIA),
)
ACCURACY_TICKS = (0.0, 0.5, 0.9, 0.99, 0.999)  # on a scale of error rates
MIN_ERROR_RATE = 2e-4  # lower error rates are drawn here


def draw_bytes(grid: ResultGrid) -> Figure:
    names = [precision["name"] for precision in grid.record["precisions"]]
    figure, subplots = new_panels(len(names), columns=1, height=2.6)
    colours = policy_colours(grid)
    for ax, name in zip(subplots, names, strict=True):
        points = [p for p in grid.select(name) if p.outcome["share"] != MEMORY_SHARES[0]]
        for policy, group in points_by_policy(points):
            accuracies = [point.result.accuracy for point in group]
            ax.plot([p.bytes for p in group], accuracies, color=colours[policy], lw=1.1)
            for point in group:
                draw_point(ax, point, SHARE_MARKERS[point.outcome["share"]], colours[policy])
        set_error_scale(ax)
        ax.set_ylabel(f"accuracy, {name}")
    subplots[-1].set_xlabel(BYTES_LABEL)
    markers = {share: SHARE_MARKERS[share] for share in MEMORY_SHARES[1:]}
    add_policy_legend(subplots[0], colours, markers)
    return figure


def draw_hits(grid: ResultGrid) -> Figure:
    figure, ax = new_axes("share of the experts in memory", "hit rate", height=4.2)
    colours = policy_colours(grid)
    for policy, points in points_by_policy(grid.select(grid.baseline_precision)):
        shares = [float(point.outcome["share"].rstrip("%")) / 100 for point in points]
        rates, style = [p.hit_rate for p in points], SeriesStyle(colours[policy], "o", policy)
        draw_series(ax, Series(None, shares, rates, style, width=1.1, size=4))
    draw_guide(ax, [0, 1], [0, 1])
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02))
    format_percent(ax)
    format_percent(ax, axis="x")
    add_policy_legend(ax, colours, {})
    return figure


def draw_commits(grid: ResultGrid) -> Figure:
    kinds, colours = grid.commit_kinds, policy_colours(grid)
    figure, subplots = new_panels(len(kinds), columns=1, height=2.6)
    for ax, commit in zip(subplots, kinds, strict=True):
        for point in grid.main_points(commit):
            draw_point(ax, point, "o", colours[point.policy], hollow=point.run["looks"])
        by = "the policy" if commit == "policy" else "vanilla"
        ax.set_ylabel(f"accuracy, commits by {by}")
        set_error_scale(ax)
    widest = max(end for ax in subplots for end in ax.get_xlim())
    for ax in subplots:
        ax.set_xlim(0, widest)
    subplots[-1].set_xlabel(BYTES_LABEL)
    add_policy_legend(subplots[0], colours, {})
    return figure


def points_by_policy(points: Sequence[CachePoint]) -> list[tuple[str, list[CachePoint]]]:
    """The points of each policy, from the largest cache to the smallest."""
    order = sorted(points, key=lambda p: (p.policy, MEMORY_SHARES.index(p.outcome["share"])))
    return [(policy, list(group)) for policy, group in groupby(order, key=lambda p: p.policy)]


def draw_point(
    ax: Axes, point: CachePoint, marker: str, colour: str, *, hollow: bool = False
) -> None:
    """One point with its Wilson interval; an error rate of 0 is drawn on the upper edge."""
    accuracy, (low, high) = point.result.accuracy, point.result.interval
    ax.errorbar(
        [point.bytes], [accuracy], yerr=[[accuracy - low], [high - accuracy]], color=colour,
        marker=marker, ms=5, elinewidth=0.7, capsize=0, ls="",
        markerfacecolor="none" if hollow else colour, clip_on=False,
    )  # fmt: skip


def policy_colours(grid: ResultGrid) -> dict[str, str]:
    policies = dict.fromkeys(point.policy for point in grid.points)
    return {policy: COLOURS[index % len(COLOURS)] for index, policy in enumerate(policies)}


def set_error_scale(ax: Axes) -> None:
    """Logarithmic error rates on y (90 % to 99 % is as far as 99 % to 99.9 %), bytes on x."""

    def to_scale(accuracy: np.ndarray) -> np.ndarray:
        return -np.log10(np.clip(1 - np.asarray(accuracy), MIN_ERROR_RATE, None))

    def from_scale(position: np.ndarray) -> np.ndarray:
        return 1 - 10 ** -np.asarray(position)

    ax.set_yscale("function", functions=(to_scale, from_scale))
    labels = [f"{tick:.1%}" for tick in ACCURACY_TICKS]
    ax.set(ylim=(0.0, 1 - MIN_ERROR_RATE), yticks=ACCURACY_TICKS, yticklabels=labels)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlim(0, None)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(lambda value, _: decimal_bytes(value))


def add_policy_legend(ax: Axes, colours: Mapping[str, str], markers: Mapping[str, str]) -> None:
    """The policies by colour and the shares by marker, above the axes."""
    handles = [Line2D([], [], color=colour, label=policy) for policy, colour in colours.items()]
    handles += [
        Line2D([], [], color=foreground(), marker=marker, ls="", label=format_share(share))
        for share, marker in markers.items()
    ]
    legend = ax.legend(handles=handles, ncols=2, loc="lower left", fontsize=6.5)
    legend.set_bbox_to_anchor((0, 1.0), transform=ax.transAxes)
