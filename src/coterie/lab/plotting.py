"""One style for all figures: a colour and a marker per policy family, light and dark schemes.

A drawing function takes its axes from ``new_axes`` or ``new_panels`` and its colours from
``policy_style`` and ``SERIES_COLOURS``. It runs once per scheme, inside ``style_context``. The
scheme is held in matplotlib's settings during the drawing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from coterie.files import atomic_write

ColourScheme = Literal["light", "dark"]

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
