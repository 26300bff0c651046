"""A run's traffic over its forwards, as one figure and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from coterie.experts.imagined import IMAGINED
from coterie.experts.ledger import WRITING, Line
from coterie.experts.traffic import Traffic
from coterie.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 1 << 20
WIDTH, HEIGHTS = 6.4, (2.6, 1.5, 1.5)  # inches
TIERS = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)
NARROW = 0.03  # of the axis: what a block's number needs to be told


@dataclass(frozen=True)
class Passed:
    """One forward of a run: what it moved; where it decoded, the votes it kept and lost."""

    line: Line
    votes_kept: float | None = None
    drift: float | None = None

    def document(self) -> dict[str, object]:
        """As JSON values; bytes are of all layers."""
        line, moved = self.line, self.line.traffic
        return {
            "forward": line.number,
            "kind": line.kind,
            "blocks": list(line.blocks),
            "experts_used": moved.used,
            "hit_rate": moved.hit_rate,
            "bytes_moved_from": {tier: one.bytes for tier, one in moved.sources.items()},
            "bytes_without_cache": moved.bytes_without_cache,
            "bytes_of_vanilla": moved.bytes_of_vanilla,
            "stalled": moved.stalled,
            "seconds": moved.seconds,
            "vote_mass_kept": self.votes_kept,
            "drift": self.drift,
        }


def write(name: Path, title: str, course: Sequence[Passed]) -> list[Path]:
    """NAME-light.svg and NAME-dark.svg; returns their paths."""
    paths = []
    for scheme in get_args(style.Scheme):
        path = name.with_name(f"{name.name}-{scheme}.svg")
        drawn = style.drawn(lambda: figure(title, course), name="traffic", scheme=scheme)
        path.write_text(drawn, encoding="utf-8")
        paths.append(path)
    return paths


def figure(title: str, course: Sequence[Passed]) -> Figure:
    """Bytes that came, hits and stalls, votes: one below the other, over the same forwards."""
    drawing, (first, *_) = style.panels(1, columns=1, width=WIDTH, height=sum(HEIGHTS))
    first.remove()
    grid = drawing.add_gridspec(3, 1, height_ratios=HEIGHTS)
    bytes_, hits, votes = (drawing.add_subplot(grid[place]) for place in range(3))
    _bytes(bytes_, [one.line.traffic for one in course])
    _hits(hits, [one.line.traffic for one in course])
    _votes(votes, course)
    for one in (bytes_, hits, votes):
        _blocks(one, course, named=one is bytes_)
        one.set_xlim(-0.5, len(course) - 0.5)
        one.locator_params(axis="x", integer=True)
        one.grid(visible=False, axis="x")
    for one in (bytes_, hits):
        one.tick_params(labelbottom=False)
    votes.set_xlabel("forward (\u25b4 only writes keys)")
    drawing.suptitle(title, x=0.01, ha="left", fontsize=10)
    return drawing


def _bytes(one: Axes, moved: Sequence[Traffic]) -> None:
    """What came, tier upon tier, and what would have come."""
    places = range(len(moved))
    edges = [place - 0.5 for place in (*places, len(moved))]
    below = [0.0] * len(moved)
    for tier, colour in zip(_tiers(moved), TIERS * len(moved), strict=False):
        each = [one.sources[tier].bytes / MIB if tier in one.sources else 0.0 for one in moved]
        above = [low + high for low, high in zip(below, each, strict=True)]
        one.stairs(above, edges, baseline=below, fill=True, color=colour, label=_told(tier))
        below = above
    usual = [found.bytes_of_vanilla for found in moved]
    if all(size is not None for size in usual):
        one.stairs(
            [(size or 0) / MIB for size in usual], edges, baseline=None, color=style.RED,
            linewidth=1.4, label="vanilla with LRU",
        )  # fmt: skip
    one.stairs(
        [found.bytes_without_cache / MIB for found in moved], edges, baseline=None,
        color=style.GREY, linestyle=":", linewidth=1.4, label="without a cache",
    )  # fmt: skip
    one.set_ylabel("MiB moved")
    one.set_ylim(bottom=0)
    style.legend(one, columns=4)


def _hits(one: Axes, moved: Sequence[Traffic]) -> None:
    places = range(len(moved))
    rates = [found.hit_rate for found in moved]
    one.plot(places, rates, color=style.GREEN, marker=_dot(moved), label="experts that were there")
    if any(found.waited for found in moved):
        shares = [found.stalled or 0.0 for found in moved]
        one.plot(
            places, shares, color=style.RED, marker=_dot(moved), label="time waited for others"
        )
    _shares(one)


def _votes(one: Axes, course: Sequence[Passed]) -> None:
    """Of forwards that decode; the others are routed by nobody's votes, or say nothing of it."""
    told = [(at, each.votes_kept) for at, each in enumerate(course) if each.votes_kept is not None]
    one.plot(*_columns(told), color=style.BLUE, marker=_dot(course), label="votes kept")
    lost = [(at, each.drift) for at, each in enumerate(course) if each.drift is not None]
    if lost:
        one.plot(
            *_columns(lost), color=style.ORANGE, marker=_dot(course), label="votes lost to drift"
        )
    _shares(one)


def _columns(told: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [at for at, _ in told], [share for _, share in told]


def _shares(one: Axes) -> None:
    one.set_ylim(-0.04, 1.04)
    style.percent(one)
    style.legend(one, columns=2)


def _blocks(one: Axes, course: Sequence[Passed], *, named: bool) -> None:
    """Every other block stands on a shade; marks on the axis are forwards that only write keys."""
    low, high = one.get_ylim()
    for block, forwards in groupby(enumerate(course), key=lambda each: each[1].line.blocks):
        first, *others = [place for place, _ in forwards]
        last = others[-1] if others else first
        if sum(block) % 2:
            one.axvspan(
                first - 0.5, last + 0.5, color=style.faint(), alpha=0.45, linewidth=0, zorder=0
            )
        if named and (last + 1 - first) / len(course) >= NARROW:
            told = f"block {block[0]}" if first == 0 and len(block) == 1 else f"{block[0]}"
            one.text(
                (first + last) / 2, high - 0.03 * (high - low), told if len(block) == 1 else "",
                ha="center", va="top", fontsize=8, color=style.ink(),
            )  # fmt: skip
    writing = [place for place, each in enumerate(course) if each.line.kind in WRITING]
    one.plot(
        writing, [0.0] * len(writing), "^", color=style.ink(), markersize=3.5, clip_on=False,
        transform=one.get_xaxis_transform(), zorder=5,
    )  # fmt: skip


def _tiers(moved: Sequence[Traffic]) -> list[str]:
    return list(dict.fromkeys(tier for one in moved for tier in one.sources))


def _told(tier: str) -> str:
    return "would come" if tier == IMAGINED else f"from {tier}"


def _dot(of: Sequence[object]) -> str:
    """A marker where there is room for one."""
    return "o" if len(of) <= 40 else ""
