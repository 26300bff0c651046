"""One look for every figure: a colour and a marker per policy family, in a light and a dark dress.

A chapter's ``draw`` takes its axes from ``axes`` or ``panels`` and its colours from ``colour`` and
``SERIES``; the runner draws it twice, inside ``dressed``. Nothing here keeps state: what differs
between the dresses (paper, ink, grid) lives in matplotlib's settings while it draws.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

ColourScheme = Literal["light", "dark"]

FIGURE_WIDTH, FIGURE_HEIGHT = 5.2, 3.5  # inches: what a phone shows at four fifths of its size
STROKE_STYLE = 'style="stroke-linejoin: round; stroke-linecap: butt"'  # in place of a style sheet
FONTS = ["DejaVu Sans", "Verdana", "Arial"]  # laid out by the first, which is the widest

BACKGROUND: Mapping[ColourScheme, str] = {"light": "#ffffff", "dark": "#14171c"}
FOREGROUND: Mapping[ColourScheme, str] = {"light": "#1c2128", "dark": "#e4e7eb"}
GRID_COLOUR: Mapping[ColourScheme, str] = {"light": "#d5d9df", "dark": "#363c45"}

# Every colour stands out from both papers by 3 : 1, so that a policy has one colour in both.
BLUE, RED, GREEN, ORANGE = "#2477c9", "#d1495b", "#2a9165", "#c07a00"
PURPLE, TEAL, BROWN, PINK, GREY = "#8b62c9", "#1f919b", "#a0673c", "#c659a5", "#7d848e"
OLIVE, INDIGO, FUCHSIA = "#7d8a1f", "#5b6ee1", "#c026d3"
SERIES_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, BROWN, GREY)


@dataclass(frozen=True)
class SeriesStyle:
    """How a policy family is drawn; the marker tells it apart where colours do not."""

    colour: str
    marker: str
    name: str  # as a legend calls it


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
    """Of the family that a spelling belongs to: "des-vote:beta=0.3" -> DES-Vote's."""
    guarded = "voters=before-eos" in policy and "protect=top1" in policy
    if policy.startswith("des-vote") and guarded:
        return GUARDED_STYLE
    return POLICY_STYLES.get(policy.partition(":")[0], OTHER_STYLE)


def policy_colour(policy: str) -> str:
    return policy_style(policy).colour


def policy_marker(policy: str) -> str:
    return policy_style(policy).marker


def foreground() -> str:
    """What text and lines of no policy are drawn in, in the dress in force."""
    return str(mpl.rcParams["text.color"])


def grid_colour() -> str:
    """For grids and what only guides the eye."""
    return str(mpl.rcParams["grid.color"])


def background() -> str:
    return str(mpl.rcParams["figure.facecolor"])


def new_axes(
    x: str = "", y: str = "", *, width: float = FIGURE_WIDTH, height: float = FIGURE_HEIGHT
) -> tuple[Figure, Axes]:
    """A new figure with one pair of axes, labelled; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.add_subplot()
    ax.set(xlabel=x, ylabel=y)
    return figure, ax


def new_panels(
    count: int, *, columns: int = 2, width: float = FIGURE_WIDTH, height: float = 2.4
) -> tuple[Figure, list[Axes]]:
    """A new figure of ``count`` axes, row by row; ``height`` is a row's."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def add_legend(ax: Axes, *, columns: int = 2, above: bool = True) -> None:
    """Above the axes, where it hides nothing; or inside, where matplotlib finds room."""
    handles, labels = ax.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    if not by_label:
        return
    legend = ax.legend(by_label.values(), by_label.keys(), ncols=columns, loc="best")
    if above:
        legend.set(loc="lower left")
        legend.set_bbox_to_anchor((0, 1.0), transform=ax.transAxes)


def format_percent(ax: Axes, *, axis: Literal["x", "y"] = "y") -> None:
    """Shares as percent."""
    target = ax.yaxis if axis == "y" else ax.xaxis
    target.set_major_formatter(lambda value, _: f"{value:.0%}")


@contextmanager
def style_context(scheme: ColourScheme, *, salt: str = "") -> Iterator[None]:
    """Figures made and written inside look so; ``salt`` keeps the ids of two figures apart."""
    with mpl.rc_context():
        mpl.rcParams.update({**rc_params(scheme), "svg.hashsalt": f"{salt}-{scheme}"})  # pyright: ignore[reportArgumentType, reportCallIssue]
        yield


def rc_params(scheme: ColourScheme) -> dict[str, object]:
    """Matplotlib's settings of one dress."""
    background, foreground, grid_colour = (
        BACKGROUND[scheme],
        FOREGROUND[scheme],
        GRID_COLOUR[scheme],
    )
    foreground_keys = (
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
        "axes.labelcolor",
        "text.color",
    )
    return {
        **dict.fromkeys(foreground_keys, foreground),
        "figure.facecolor": background,
        "axes.facecolor": background,
        "savefig.facecolor": background,
        "grid.color": grid_colour,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.prop_cycle": cycler(color=SERIES_COLOURS),
        "lines.linewidth": 1.6,
        "lines.markersize": 5.5,
        "font.family": "sans-serif",
        "font.sans-serif": FONTS,
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "legend.handlelength": 1.4,
        "legend.columnspacing": 1.2,
        "legend.labelspacing": 0.3,
        "image.cmap": "viridis",
        "svg.fonttype": "none",
    }


def render_svg(draw: Callable[[], Figure], *, name: str, scheme: ColourScheme) -> str:
    """A figure as SVG text that needs nothing else, the same bytes every time.

    Text stays text. What matplotlib says of itself (dates, its address) is left out, and ids are
    made this figure's own, so that many can stand in one page.
    """
    buffer = io.StringIO()
    with style_context(scheme, salt=name):
        draw().savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", buffer.getvalue(), flags=re.S)
    text = text[text.index("<svg") :].strip().replace("<svg ", f"<svg {STROKE_STYLE} ", 1)
    return _prefix_ids(text, f"{name}-{scheme}")


def _prefix_ids(svg: str, prefix: str) -> str:
    """Only the ids that something refers to, each with the figure's name before it."""
    referenced = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))

    def replace_id(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match[1]}"' if match[1] in referenced else ""

    svg = re.sub(r' id="([^"]*)"', replace_id, svg)
    return re.sub(r"(url\(#|href=\"#)([^)\"]+)", rf"\g<1>{prefix}-\g<2>", svg)
