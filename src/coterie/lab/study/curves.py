"""Accuracy against experts: how the accuracy chapters draw and tabulate their arms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.lab.plotting import (
    FIGURE_HEIGHT,
    SERIES_COLOURS,
    SeriesStyle,
    add_legend,
    foreground,
    format_percent,
    new_axes,
    policy_style,
)
from coterie.lab.study.experiment import Table
from coterie.lab.study.paired import format_p
from coterie.lab.study.results import VariantResult, VariantResults

MARKERS = "oDs^vPXp*"

ColorBy = Literal["family", "place"]  # a line's colour: its policy's own, or by its place


def draw_comparison(
    results: VariantResults,
    *,
    labels: Sequence[str] = (),
    front: bool = False,
    looks: ColorBy = "family",
) -> Figure:
    """A line for each group, Wilson intervals on its points, vanilla as a star and a dotted line.

    ``front``: the Pareto front over all groups, drawn or not.
    """
    shown = {label: results.groups[label] for label in labels or results.groups}
    height = FIGURE_HEIGHT + 0.15 * len(shown)
    figure, ax = new_axes(
        f"unique experts of {results.experts}, a layer and forward", "right answers", height=height
    )
    for index, (label, variant_results) in enumerate(shown.items()):
        style = policy_style(variant_results[-1].policy) if looks == "family" else style_at(index)
        draw_curve(ax, variant_results, label, style)
    draw_vanilla(ax, results.vanilla)
    if front:
        front_points = pareto_front(
            [results.vanilla, *(t for group in results.groups.values() for t in group)]
        )
        xs, ys = [t.experts for t in front_points], [t.accuracy for t in front_points]
        ax.step(
            xs, ys, where="post", color=foreground(), lw=0.9, ls=(0, (1, 2)), label="Pareto front"
        )
    ax.set(ylim=(-0.02, 1.03), xlim=(0, None))
    format_percent(ax)
    add_legend(ax, columns=3 if looks == "family" and len(shown) > 4 else 2)
    return figure


def draw_curve(
    ax: Axes, variant_results: Iterable[VariantResult], label: str, style: SeriesStyle
) -> None:
    """One group's points, joined in the order of their experts."""
    variant_results = sorted(variant_results, key=lambda tally: tally.experts)
    xs, ys = (
        [result.experts for result in variant_results],
        [result.accuracy for result in variant_results],
    )
    ax.errorbar(
        xs, ys, yerr=wilson(variant_results), label=label, color=style.colour, marker=style.marker,
        elinewidth=0.7, capsize=0,
    )  # fmt: skip


def wilson(variant_results: Sequence[VariantResult]) -> list[list[float]]:
    """Distances down and up to the interval's ends, as error bars want them."""
    ends = [(result.accuracy, *result.accuracy_share().interval) for result in variant_results]
    return [[y - low for y, low, _ in ends], [high - y for y, _, high in ends]]


def draw_vanilla(ax: Axes, vanilla: VariantResult) -> None:
    ax.axhline(vanilla.accuracy, color=foreground(), lw=0.7, ls=(0, (1, 3)))
    style = policy_style("vanilla")
    ax.plot([vanilla.experts], [vanilla.accuracy], marker=style.marker, ms=11, ls="",
             color=style.colour, label="vanilla")  # fmt: skip


def style_at(index: int) -> SeriesStyle:
    """The look of a line that is told apart by its place only."""
    return SeriesStyle(
        SERIES_COLOURS[index % len(SERIES_COLOURS)], MARKERS[index % len(MARKERS)], ""
    )


def pareto_front(variant_results: Iterable[VariantResult]) -> list[VariantResult]:
    """Those that nobody beats with as few experts, fewest first."""
    front: list[VariantResult] = []
    for result in sorted(variant_results, key=lambda result: (result.experts, -result.accuracy)):
        if not front or result.accuracy > front[-1].accuracy:
            front.append(result)
    return front


def variant_table(
    groups: Mapping[str, Sequence[VariantResult]], vanilla: VariantResult, caption: str
) -> Table:
    """One arm a row: accuracy with its interval, the paired change, and what was read for it."""
    heads = ("policy", "right, 95 %", "against vanilla", "p", "relative", "experts", "forwards")
    rows = [variant_row(vanilla, vanilla)]
    listed = {vanilla.name}
    for result in (result for variant_results in groups.values() for result in variant_results):
        if result.name not in listed:
            rows.append(variant_row(result, vanilla))
            listed.add(result.name)
    return Table(heads, rows, caption, numbers=range(1, len(heads)))


def variant_row(result: VariantResult, vanilla: VariantResult) -> list[str]:
    share, change = result.accuracy_share(), result.compare_to(vanilla)
    low, high = share.interval
    is_vanilla = result is vanilla
    return [
        result.name,
        f"{share.value:.1%}, {low:.1%} to {high:.1%}",
        "" if is_vanilla else f"{change.difference:+.1%}",
        "" if is_vanilla else format_p(change.p_value, bare=True),
        format_relative(result, vanilla),
        f"{result.experts:.1f}",
        f"{result.forwards_per_block:.2f}",
    ]


def format_relative(result: VariantResult, vanilla: VariantResult) -> str:
    return f"{result.accuracy / vanilla.accuracy:.1%}" if vanilla.accuracy else ""
