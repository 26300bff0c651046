"""Accuracy against experts: how the accuracy chapters draw and tabulate their arms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.figures.style import HEIGHT, SERIES, Look, axes, ink, legend, look, percent
from coterie.study.chapter import Table
from coterie.study.duel import p_value
from coterie.study.tally import Arms, Tally

MARKERS = "oDs^vPXp*"

Looks = Literal["family", "place"]  # a line's colour: its policy's own, or by its place


def draw(
    arms: Arms, *, labels: Sequence[str] = (), front: bool = False, looks: Looks = "family"
) -> Figure:
    """A line for each group, Wilson intervals on its points, vanilla as a star and a dotted line.

    ``front``: the Pareto front over all groups, drawn or not.
    """
    shown = {label: arms.groups[label] for label in labels or arms.groups}
    height = HEIGHT + 0.15 * len(shown)
    figure, one = axes(
        f"unique experts of {arms.experts}, a layer and forward", "right answers", height=height
    )
    for place, (label, tallies) in enumerate(shown.items()):
        dress = look(tallies[-1].policy) if looks == "family" else by_place(place)
        curve(one, tallies, label, dress)
    mark_vanilla(one, arms.vanilla)
    if front:
        every = pareto([arms.vanilla, *(t for group in arms.groups.values() for t in group)])
        xs, ys = [t.experts for t in every], [t.accuracy for t in every]
        one.step(xs, ys, where="post", color=ink(), lw=0.9, ls=(0, (1, 2)), label="Pareto front")
    one.set(ylim=(-0.02, 1.03), xlim=(0, None))
    percent(one)
    legend(one, columns=3 if looks == "family" and len(shown) > 4 else 2)
    return figure


def curve(one: Axes, tallies: Iterable[Tally], label: str, dress: Look) -> None:
    """One group's points, joined in the order of their experts."""
    tallies = sorted(tallies, key=lambda tally: tally.experts)
    xs, ys = [tally.experts for tally in tallies], [tally.accuracy for tally in tallies]
    one.errorbar(
        xs, ys, yerr=wilson(tallies), label=label, color=dress.colour, marker=dress.marker,
        elinewidth=0.7, capsize=0,
    )  # fmt: skip


def wilson(tallies: Sequence[Tally]) -> list[list[float]]:
    """Distances down and up to the interval's ends, as error bars want them."""
    ends = [(tally.accuracy, *tally.share().interval) for tally in tallies]
    return [[y - low for y, low, _ in ends], [high - y for y, _, high in ends]]


def mark_vanilla(one: Axes, vanilla: Tally) -> None:
    one.axhline(vanilla.accuracy, color=ink(), lw=0.7, ls=(0, (1, 3)))
    dress = look("vanilla")
    one.plot([vanilla.experts], [vanilla.accuracy], marker=dress.marker, ms=11, ls="",
             color=dress.colour, label="vanilla")  # fmt: skip


def by_place(place: int) -> Look:
    """The look of a line that is told apart by its place only."""
    return Look(SERIES[place % len(SERIES)], MARKERS[place % len(MARKERS)], "")


def pareto(tallies: Iterable[Tally]) -> list[Tally]:
    """Those that nobody beats with as few experts, fewest first."""
    front: list[Tally] = []
    for tally in sorted(tallies, key=lambda tally: (tally.experts, -tally.accuracy)):
        if not front or tally.accuracy > front[-1].accuracy:
            front.append(tally)
    return front


def arm_table(groups: Mapping[str, Sequence[Tally]], vanilla: Tally, caption: str) -> Table:
    """One arm a row: accuracy with its interval, the paired change, and what was read for it."""
    heads = ("policy", "right, 95 %", "against vanilla", "p", "relative", "experts", "forwards")
    rows = [arm_row(vanilla, vanilla)]
    seen = {vanilla.name}
    for tally in (tally for tallies in groups.values() for tally in tallies):
        if tally.name not in seen:
            rows.append(arm_row(tally, vanilla))
            seen.add(tally.name)
    return Table(heads, rows, caption, numbers=range(1, len(heads)))


def arm_row(tally: Tally, vanilla: Tally) -> list[str]:
    share, change = tally.share(), tally.against(vanilla)
    low, high = share.interval
    same = tally is vanilla
    return [
        tally.name,
        f"{share.value:.1%}, {low:.1%} to {high:.1%}",
        "" if same else f"{change.difference:+.1%}",
        "" if same else p_value(change.p, bare=True),
        relative(tally, vanilla),
        f"{tally.experts:.1f}",
        f"{tally.forwards_per_block:.2f}",
    ]


def relative(tally: Tally, vanilla: Tally) -> str:
    return f"{tally.accuracy / vanilla.accuracy:.1%}" if vanilla.accuracy else ""
