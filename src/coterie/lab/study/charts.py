"""Line and scatter charts of the study: one description of a series, one way to draw it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from coterie.lab.plotting import (
    FIGURE_HEIGHT,
    SeriesStyle,
    add_legend,
    foreground,
    format_percent,
    new_axes,
    policy_style,
)
from coterie.lab.timing import TimingStats

T = TypeVar("T")
LineStyle = str | tuple[int, tuple[float, ...]]
Limits = tuple[float | None, float | None]
TEXT_STYLE = SeriesStyle("", "", "")
DASHES: Sequence[LineStyle] = ("-", (0, (4, 1.5)), ":", "-.")


@dataclass(frozen=True)
class Series:
    """Points of one label. ``intervals`` are the ends of each point's error bar.

    A style without a colour draws in the text colour.
    """

    label: str | None
    x: Sequence[float]
    y: Sequence[float]
    style: SeriesStyle
    line: LineStyle = "-"  # "" draws the points alone
    intervals: Sequence[Sequence[float]] | None = None
    width: float = 1.6
    alpha: float = 1.0
    size: float | None = None
    steps: bool = False  # a staircase: each value holds up to the next point


def policy_series(
    policy: str,
    x: Sequence[float],
    y: Sequence[float],
    *,
    label: str | None = None,
    **options: Any,
) -> Series:
    """A series in the colour and marker of a policy's family; ``label`` defaults to the policy."""
    return Series(label or policy, x, y, policy_style(policy), **options)


def dash_repeats(policies: Sequence[str]) -> list[LineStyle]:
    """Line styles that differ between policies of the same colour."""
    counts: dict[str, int] = {}
    lines = []
    for policy in policies:
        colour = policy_style(policy).colour
        lines.append(DASHES[counts.get(colour, 0) % len(DASHES)])
        counts[colour] = counts.get(colour, 0) + 1
    return lines


def line_chart(
    series: Iterable[Series],
    x: str,
    y: str,
    *,
    xlim: Limits = (None, None),
    ylim: Limits = (None, None),
    percent: Literal["", "y"] = "",
    log: Literal["", "y"] = "",
    doublings: Sequence[int] = (),
    level: float | None = None,
    columns: int = 2,
    height: float = FIGURE_HEIGHT,
) -> Figure:
    """A figure with one pair of axes, all series, and a legend above it.

    ``doublings`` are the ticks of a binary logarithmic x axis; ``level`` is the height of a dotted
    horizontal line.
    """
    figure, ax = new_axes(x, y, height=height)
    for one in series:
        draw_series(ax, one)
    if level is not None:
        ax.axhline(level, color=foreground(), lw=0.7, ls=(0, (1, 3)))
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    if doublings:
        ax.set_xscale("log", base=2)
        ax.set_xticks(doublings, [str(tick) for tick in doublings])
    if percent:
        format_percent(ax)
    ax.set_xlim(*xlim)
    ax.set_ylim(*ylim)
    add_legend(ax, columns=columns)
    return figure


def draw_series(ax: Axes, series: Series) -> None:
    errors = None
    if series.intervals is not None:
        ends = list(zip(series.y, series.intervals, strict=True))
        errors = [[max(0.0, y - i[0]) for y, i in ends], [max(0.0, i[1] - y) for y, i in ends]]
    ax.errorbar(
        series.x, series.y, yerr=errors, label=series.label,
        color=series.style.colour or foreground(), marker=series.style.marker, ls=series.line,
        lw=series.width, alpha=series.alpha, ms=series.size, elinewidth=0.8,
        drawstyle="steps-post" if series.steps else None,
    )  # fmt: skip


def guide_series(
    x: Sequence[float], y: Sequence[float], label: str | None = None, **options: Any
) -> Series:
    """A thin line without markers in the text colour: a bound, a front or a reference curve."""
    return Series(label, x, y, TEXT_STYLE, **{"line": "--", "width": 1.0, **options})


def pareto_front(items: Iterable[T], key: Callable[[T], tuple[float, float]]) -> list[T]:
    """The items that no other beats in both of ``key``'s (cost, gain), by rising cost."""
    front: list[T] = []
    for item in sorted(items, key=lambda item: (key(item)[0], -key(item)[1])):
        if not front or key(item)[1] > key(front[-1])[1]:
            front.append(item)
    return front


def timing_series(
    style: SeriesStyle,
    x: Sequence[float],
    timings: Sequence[TimingStats],
    label: str,
    line: LineStyle = "-",
) -> Series:
    """Median milliseconds with quartiles as error bars."""
    medians = [timing["median"] * 1e3 for timing in timings]
    quartiles = [(timing["low"] * 1e3, timing["high"] * 1e3) for timing in timings]
    return Series(label, x, medians, style, line, quartiles)
