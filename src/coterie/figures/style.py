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

Scheme = Literal["light", "dark"]

WIDTH, HEIGHT = 5.2, 3.5  # inches: what a phone shows at four fifths of its size
STROKES = 'style="stroke-linejoin: round; stroke-linecap: butt"'  # in place of a style sheet
FONTS = ["DejaVu Sans", "Verdana", "Arial"]  # laid out by the first, which is the widest

PAPER: Mapping[Scheme, str] = {"light": "#ffffff", "dark": "#14171c"}
INK: Mapping[Scheme, str] = {"light": "#1c2128", "dark": "#e4e7eb"}
FAINT: Mapping[Scheme, str] = {"light": "#d5d9df", "dark": "#363c45"}

# Every colour stands out from both papers by 3 : 1, so that a policy has one colour in both.
BLUE, RED, GREEN, ORANGE = "#2477c9", "#d1495b", "#2a9165", "#c07a00"
PURPLE, TEAL, BROWN, PINK, GREY = "#8b62c9", "#1f919b", "#a0673c", "#c659a5", "#7d848e"
OLIVE, INDIGO, FUCHSIA = "#7d8a1f", "#5b6ee1", "#c026d3"
SERIES = (BLUE, ORANGE, GREEN, RED, PURPLE, TEAL, PINK, BROWN, GREY)


@dataclass(frozen=True)
class Look:
    """How a policy family is drawn; the marker tells it apart where colours do not."""

    colour: str
    marker: str
    name: str  # as a legend calls it


LOOKS: Mapping[str, Look] = {
    "vanilla": Look(GREY, "*", "vanilla"),
    "topk": Look(ORANGE, "s", "top-k"),
    "naee": Look(BROWN, "v", "NAEE"),
    "mc-moe": Look(PINK, "<", "MC-MoE"),
    "des-seq": Look(GREEN, "D", "DES-Seq"),
    "des-vote": Look(BLUE, "o", "DES-Vote"),
    "uniform-vote": Look(TEAL, "p", "uniform vote"),
    "xshare": Look(PURPLE, "h", "XShare"),
    "racing": Look(BROWN, ">", "racing"),
    "mass-vote": Look(OLIVE, "^", "mass vote"),
    "proportional-vote": Look(RED, "P", "proportional vote"),
    "priced-vote": Look(FUCHSIA, "X", "priced vote"),
    "random": Look(GREY, "x", "random"),
    "resident-vote": Look(PINK, "d", "resident vote"),
    "coreset": Look(GREY, "H", "other coreset"),
}
GUARDED = Look(INDIGO, "d", "DES-Vote, guarded")
OTHER = Look(PURPLE, "8", "other")


def look(policy: str) -> Look:
    """Of the family that a spelling belongs to: "des-vote:beta=0.3" -> DES-Vote's."""
    guarded = "voters=before-eos" in policy and "protect=top1" in policy
    if policy.startswith("des-vote") and guarded:
        return GUARDED
    return LOOKS.get(policy.partition(":")[0], OTHER)


def colour(policy: str) -> str:
    return look(policy).colour


def marker(policy: str) -> str:
    return look(policy).marker


def ink() -> str:
    """What text and lines of no policy are drawn in, in the dress in force."""
    return str(mpl.rcParams["text.color"])


def faint() -> str:
    """For grids and what only guides the eye."""
    return str(mpl.rcParams["grid.color"])


def paper() -> str:
    return str(mpl.rcParams["figure.facecolor"])


def axes(
    x: str = "", y: str = "", *, width: float = WIDTH, height: float = HEIGHT
) -> tuple[Figure, Axes]:
    """A new figure with one pair of axes, labelled; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    one = figure.add_subplot()
    one.set(xlabel=x, ylabel=y)
    return figure, one


def panels(
    count: int, *, columns: int = 2, width: float = WIDTH, height: float = 2.4
) -> tuple[Figure, list[Axes]]:
    """A new figure of ``count`` axes, row by row; ``height`` is a row's."""
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def legend(one: Axes, *, columns: int = 2, above: bool = True) -> None:
    """Above the axes, where it hides nothing; or inside, where matplotlib finds room."""
    handles, labels = one.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    if not by_label:
        return
    shown = one.legend(by_label.values(), by_label.keys(), ncols=columns, loc="best")
    if above:
        shown.set(loc="lower left")
        shown.set_bbox_to_anchor((0, 1.0), transform=one.transAxes)


def percent(one: Axes, *, axis: Literal["x", "y"] = "y") -> None:
    """Shares as percent."""
    chosen = one.yaxis if axis == "y" else one.xaxis
    chosen.set_major_formatter(lambda value, _: f"{value:.0%}")


@contextmanager
def dressed(scheme: Scheme, *, salt: str = "") -> Iterator[None]:
    """Figures made and written inside look so; ``salt`` keeps the ids of two figures apart."""
    with mpl.rc_context():
        mpl.rcParams.update({**settings(scheme), "svg.hashsalt": f"{salt}-{scheme}"})  # pyright: ignore[reportArgumentType, reportCallIssue]
        yield


def settings(scheme: Scheme) -> dict[str, object]:
    """Matplotlib's settings of one dress."""
    paper, ink, faint = PAPER[scheme], INK[scheme], FAINT[scheme]
    lines = ("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor", "text.color")
    return {
        **dict.fromkeys(lines, ink),
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "grid.color": faint,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.prop_cycle": cycler(color=SERIES),
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


def drawn(draw: Callable[[], Figure], *, name: str, scheme: Scheme) -> str:
    """A figure as SVG text that needs nothing else, the same bytes every time.

    Text stays text. What matplotlib says of itself (dates, its address) is left out, and ids are
    made this figure's own, so that many can stand in one page.
    """
    written = io.StringIO()
    with dressed(scheme, salt=name):
        draw().savefig(written, format="svg", metadata={"Date": None})
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", written.getvalue(), flags=re.S)
    text = text[text.index("<svg") :].strip().replace("<svg ", f"<svg {STROKES} ", 1)
    return _own_ids(text, f"{name}-{scheme}")


def _own_ids(svg: str, prefix: str) -> str:
    """Only the ids that something refers to, each with the figure's name before it."""
    referred = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))

    def renamed(found: re.Match[str]) -> str:
        return f' id="{prefix}-{found[1]}"' if found[1] in referred else ""

    svg = re.sub(r' id="([^"]*)"', renamed, svg)
    return re.sub(r"(url\(#|href=\"#)([^)\"]+)", rf"\g<1>{prefix}-\g<2>", svg)
