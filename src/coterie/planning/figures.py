"""The figures beside a replay: bytes against capacity, and how alike steps are, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from coterie.figures import style
from coterie.planning.replay import Replay, Replayed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = ("-", "--", ":", "-.")  # a cache each
MIB = 1 << 20


def write(folder: Path, made: Replay) -> list[Path]:
    """Each figure as SVG, in a light and a dark dress; returns their paths."""
    draws: dict[str, Callable[[], Figure]] = {"replay-bytes": partial(moved, made)}
    if any(found.steps or found.blocks for found in made.overlaps.values()):
        draws["replay-overlap"] = partial(alike, made)
    paths = []
    for name, draw in draws.items():
        for scheme in get_args(style.Scheme):
            path = folder / f"{name}-{scheme}.svg"
            path.write_text(style.drawn(draw, name=name, scheme=scheme), encoding="utf-8")
            paths.append(path)
    return paths


def moved(made: Replay) -> Figure:
    """Bytes of a forward over slots; of the first precision, which scales all the others."""
    figure, one = style.axes("slots of each layer", "MiB moved a forward")
    first = made.points[0].case
    shown = [p for p in made.points if p.case.precision == first.precision]
    caches = list(dict.fromkeys(p.case.cache for p in shown))
    for (policy, cache), points in _lines(shown).items():
        ordered = sorted({(p.slots, p.traffic.bytes_moved / p.traffic.forwards) for p in points})
        one.plot(
            [slots for slots, _ in ordered],
            [size / MIB for _, size in ordered],
            LINES[caches.index(cache) % len(LINES)],
            color=style.colour(policy),
            marker=style.marker(policy),
            label=f"{policy}, {cache}" if len(caches) > 1 else policy,
        )
    one.set_ylim(bottom=0)
    style.legend(one, columns=1)
    return figure


def alike(made: Replay) -> Figure:
    """Jaccard's index of each layer, from step to step; where blocks take one, block to block."""
    within = any(found.steps for found in made.overlaps.values())
    where = "from step to step" if within else "from block to block"
    figure, one = style.axes("layer that routes", f"experts alike {where}")
    for name, found in made.overlaps.items():
        values = found.step_jaccard if within else found.block_jaccard
        places = range(1, len(values) + 1)
        one.plot(places, values, color=style.colour(name), marker=style.marker(name), label=name)
    one.set_ylim(0, 1)
    one.locator_params(axis="x", integer=True)
    style.legend(one, columns=1)
    return figure


def _lines(points: list[Replayed]) -> dict[tuple[str, str], list[Replayed]]:
    found: dict[tuple[str, str], list[Replayed]] = {}
    for point in points:
        found.setdefault((str(point.case.play), point.case.cache), []).append(point)
    return found
