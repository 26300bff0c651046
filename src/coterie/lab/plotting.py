"""One style for all figures: a colour and a marker per policy family, light and dark schemes.

A drawing function takes its axes from ``new_axes`` or ``new_panels`` and its colours from
``policy_style`` and ``SERIES_COLOURS``. It runs once per scheme, inside ``style_context``. The
scheme is held in matplotlib's settings during the drawing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator, NullFormatter

from coterie.files import atomic_write
from coterie.lab.timing import TimingStats

ColourScheme = Literal["light", "dark"]
T = TypeVar("T")
LineStyle = str | tuple[int, tuple[float, ...]]
Limits = tuple[float | None, float | None]

FIGURE_WIDTH, FIGURE_HEIGHT = 5.2, 3.5  # inches
STROKE_STYLE = 'style="stroke-linejoin: round; stroke-linecap: butt"'  # replaces the style sheet
STYLE_FILE = Path(__file__).with_suffix(".mplstyle")

BACKGROUND: Mapping[ColourScheme, str] = {"light": "#ffffff", "dark": "#14171c"}
FOREGROUND: Mapping[ColourScheme, str] = {"light": "#1c2128", "dark": "#e4e7eb"}
GRID_COLOUR: Mapping[ColourScheme, str] = {"light": "#d5d9df", "dark": "#363c45"}

# Every colour has a contrast of 3:1 on both backgrounds, so a policy has one colour in both.
BLUE, RED, GREEN, ORANGE = "#2477c9", "#d1495b", "#2a9165", "#c07a00"
PURPLE, TEAL, BROWN, PINK, GREY = "#8b62c9", "#1f919b", "#a0673c", "#c659a5", "#7d848e"
OLIVE, INDIGO, FUCHSIA = "#7d8a1f", "#5b6ee1", "#c026d3"
MARKERS = "oDs^vPXp*"
ROW_HEIGHT = 0.27  # inches
SERIES_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, BROWN, GREY)
DASHES: Sequence[LineStyle] = ("-", (0, (4, 1.5)), ":", "-.")


@dataclass(frozen=True)
class SeriesStyle:
    """How a policy family is drawn; the marker distinguishes families of similar colour."""

    colour: str
    marker: str
    name: str  # in legends


POLICY_STYLES: Mapping[str, SeriesStyle] = {
    "vanilla": SeriesStyle(GREY, "*", "vanilla"),
    "topk": SeriesStyle(ORANGE, "s", "top-k"),
    "naee": SeriesStyle(BROWN, "v", "NAEE"),
    "mc-moe": SeriesStyle(PINK, "<", "MC-MoE"),
    "des-seq": SeriesStyle(GREEN, "D", "DES-Seq"),
    "des-vote": SeriesStyle(BLUE, "o", "DES-Vote"),
    "uniform-vote": SeriesStyle(TEAL, "p", "uniform vote"),
    "xshare": SeriesStyle(PURPLE, "h", "XShare"),
    "racing": SeriesStyle(BROWN, ">", "racing"),
    "mass-vote": SeriesStyle(OLIVE, "^", "mass vote"),
    "proportional-vote": SeriesStyle(RED, "P", "proportional vote"),
    "priced-vote": SeriesStyle(FUCHSIA, "X", "priced vote"),
    "random": SeriesStyle(GREY, "x", "random"),
    "resident-vote": SeriesStyle(PINK, "d", "resident vote"),
    "coreset": SeriesStyle(GREY, "H", "other coreset"),
}
GUARDED_STYLE = SeriesStyle(INDIGO, "d", "DES-Vote, guarded")
TEXT_STYLE = SeriesStyle("", "", "")
OTHER_STYLE = SeriesStyle(PURPLE, "8", "other")


def policy_style(policy: str) -> SeriesStyle:
    """The style of a policy's family: that of DES-Vote for "des-vote:beta=0.3"."""
    guarded = "voters=before-eos" in policy and "protect=top1" in policy
    if policy.startswith("des-vote") and guarded:
        return GUARDED_STYLE
    return POLICY_STYLES.get(policy.partition(":")[0], OTHER_STYLE)


def foreground() -> str:
    """The current scheme's colour of text and of lines that belong to no policy."""
    return str(mpl.rcParams["text.color"])


def grid_colour() -> str:
    """The current scheme's colour of grids and guide lines."""
    return str(mpl.rcParams["grid.color"])


def new_axes(x: str = "", y: str = "", *, height: float = FIGURE_HEIGHT) -> tuple[Figure, Axes]:
    """A new figure with one pair of labelled axes; the height in inches."""
    figure = Figure(figsize=(FIGURE_WIDTH, height), layout="constrained")
    ax = figure.add_subplot()
    ax.set(xlabel=x, ylabel=y)
    return figure, ax


def new_panels(
    count: int, *, columns: int = 2, width: float = FIGURE_WIDTH, height: float = 2.4
) -> tuple[Figure, list[Axes]]:
    """A new figure of ``count`` axes, row by row; ``height`` is that of one row."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def add_legend(ax: Axes, *, columns: int = 2) -> None:
    """Adds a legend above the axes, with each label once."""
    handles, labels = ax.get_legend_handles_labels()
    if by_label := dict(zip(labels, handles, strict=True)):
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)}
        ax.legend(by_label.values(), by_label.keys(), ncols=columns, **place)


def format_percent(ax: Axes) -> None:
    """Formats the fractions of a y axis as percentages."""
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


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


@dataclass(frozen=True)
class IntervalSeries:
    """One value per row with the ends of its interval, as in ``interval_chart``."""

    label: str
    style: SeriesStyle
    values: Mapping[str, tuple[float, float, float]]  # by row: low, middle, high


def interval_chart(rows: Sequence[str], series: Sequence[IntervalSeries], unit: str) -> Figure:
    """Horizontal chart of medians with intervals: one line per row, read from top to bottom."""
    height = 1.3 + ROW_HEIGHT * len(rows) * max(1, len(series) / 2)
    figure, ax = new_axes(unit, height=height)
    spacing = 0.5 / max(1, len(series))
    for number, one in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * spacing
        present = [
            (rows.index(row) + offset, *one.values[row]) for row in rows if row in one.values
        ]
        ax.errorbar(
            [middle for _, _, middle, _ in present],
            [position for position, *_ in present],
            xerr=[
                [max(0.0, middle - low) for _, low, middle, _ in present],
                [max(0.0, high - middle) for _, _, middle, high in present],
            ],
            fmt=one.style.marker,
            color=one.style.colour,
            elinewidth=1,
            label=one.label,
        )
    ax.set_yticks(range(len(rows)), rows)
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlim=(0, None))
    if len(series) > 1:
        add_legend(ax)
    return figure


def indexed_style(index: int) -> SeriesStyle:
    """The style of a series that belongs to no policy family."""
    colour, marker = SERIES_COLOURS[index % len(SERIES_COLOURS)], MARKERS[index % len(MARKERS)]
    return SeriesStyle(colour, marker, "")


@contextmanager
def style_context(scheme: ColourScheme, *, salt: str = "") -> Iterator[None]:
    """Applies a scheme to figures drawn and saved inside; ``salt`` makes SVG ids unique."""
    with mpl.rc_context():
        mpl.rcParams.update({**rc_params(scheme), "svg.hashsalt": f"{salt}-{scheme}"})  # pyright: ignore[reportArgumentType, reportCallIssue]
        yield


def rc_params(scheme: ColourScheme) -> dict[str, object]:
    """Matplotlib settings of a colour scheme."""
    foreground_keys = ("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor")
    background_keys = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return {
        **mpl.rc_params_from_file(STYLE_FILE, use_default_template=False),
        **dict.fromkeys((*foreground_keys, "text.color"), FOREGROUND[scheme]),
        **dict.fromkeys(background_keys, BACKGROUND[scheme]),
        "grid.color": GRID_COLOUR[scheme],
        "axes.prop_cycle": cycler(color=SERIES_COLOURS),
    }


def write_figure(draw: Callable[[], Figure], path: Path, *, name: str = "") -> list[Path]:
    """Writes PATH-light.svg and PATH-dark.svg; ``name`` (default: of the path) makes ids unique."""
    paths = []
    for scheme in BACKGROUND:
        paths.append(path.with_name(f"{path.name}-{scheme}.svg"))
        svg = render_svg(draw, name=name or path.name, scheme=scheme)
        atomic_write(paths[-1], f"{svg}\n".encode())
    return paths


def render_svg(draw: Callable[[], Figure], *, name: str, scheme: ColourScheme) -> str:
    """A figure as self-contained, reproducible SVG text.

    Text remains text. Matplotlib's metadata is removed, and ids get the figure's name as a prefix,
    so that several figures can be embedded in one page.
    """
    buffer = io.StringIO()
    with style_context(scheme, salt=name):
        draw().savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", buffer.getvalue(), flags=re.S)
    text = text[text.index("<svg") :].strip().replace("<svg ", f"<svg {STROKE_STYLE} ", 1)
    return _prefix_ids(text, f"{name}-{scheme}")


def _prefix_ids(svg: str, prefix: str) -> str:
    """Prefixes referenced ids and removes the rest."""
    referenced = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))

    def replace_id(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match[1]}"' if match[1] in referenced else ""

    svg = re.sub(r' id="([^"]*)"', replace_id, svg)
    return re.sub(r"(url\(#|href=\"#)([^)\"]+)", rf"\g<1>{prefix}-\g<2>", svg)
