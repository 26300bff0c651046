"""The figures beside a replay: bytes against capacity, and how alike steps are, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from coterie.lab import plotting
from coterie.lab.replay.replay import ReplayPoint, ReplayResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE_STYLES = ("-", "--", ":", "-.")  # a cache each
MIB = 1 << 20


def write_figures(folder: Path, result: ReplayResult) -> list[Path]:
    """Each figure as SVG, in a light and a dark dress; returns their paths."""
    figures: dict[str, Callable[[], Figure]] = {"replay-bytes": partial(draw_bytes_moved, result)}
    if any(overlap.steps or overlap.blocks for overlap in result.overlaps.values()):
        figures["replay-overlap"] = partial(draw_overlap, result)
    paths = []
    for name, draw in figures.items():
        for scheme in get_args(plotting.ColourScheme):
            path = folder / f"{name}-{scheme}.svg"
            path.write_text(plotting.render_svg(draw, name=name, scheme=scheme), encoding="utf-8")
            paths.append(path)
    return paths


def draw_bytes_moved(result: ReplayResult) -> Figure:
    """Bytes of a forward over slots; of the first precision, which scales all the others."""
    figure, axes = plotting.new_axes("slots of each layer", "MiB moved a forward")
    first = result.points[0].case
    selected = [p for p in result.points if p.case.precision == first.precision]
    caches = list(dict.fromkeys(p.case.eviction for p in selected))
    for (policy, cache), points in _group_by_line(selected).items():
        ordered = sorted({(p.slots, p.traffic.bytes_moved / p.traffic.forwards) for p in points})
        axes.plot(
            [slots for slots, _ in ordered],
            [size / MIB for _, size in ordered],
            LINE_STYLES[caches.index(cache) % len(LINE_STYLES)],
            color=plotting.policy_colour(policy),
            marker=plotting.policy_marker(policy),
            label=f"{policy}, {cache}" if len(caches) > 1 else policy,
        )
    axes.set_ylim(bottom=0)
    plotting.add_legend(axes, columns=1)
    return figure


def draw_overlap(result: ReplayResult) -> Figure:
    """Jaccard's index of each layer, from step to step; where blocks take one, block to block."""
    within = any(overlap.steps for overlap in result.overlaps.values())
    pair_kind = "from step to step" if within else "from block to block"
    figure, axes = plotting.new_axes("layer that routes", f"experts alike {pair_kind}")
    for name, overlap in result.overlaps.items():
        values = overlap.step_jaccard if within else overlap.block_jaccard
        layer_numbers = range(1, len(values) + 1)
        axes.plot(
            layer_numbers,
            values,
            color=plotting.policy_colour(name),
            marker=plotting.policy_marker(name),
            label=name,
        )
    axes.set_ylim(0, 1)
    axes.locator_params(axis="x", integer=True)
    plotting.add_legend(axes, columns=1)
    return figure


def _group_by_line(points: list[ReplayPoint]) -> dict[tuple[str, str], list[ReplayPoint]]:
    lines: dict[tuple[str, str], list[ReplayPoint]] = {}
    for point in points:
        lines.setdefault((str(point.case.replay_policy), point.case.eviction), []).append(point)
    return lines
