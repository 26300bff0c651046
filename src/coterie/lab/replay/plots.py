"""Figures of a replay: bytes moved against slots, and the overlap of steps by layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from coterie.lab import plotting
from coterie.lab.replay.replay import ReplayResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE_STYLES, MIB = ("-", "--", ":", "-."), 1 << 20  # a style for each eviction policy


def write_figures(folder: Path, result: ReplayResult) -> list[Path]:
    """Write each figure as SVG in both colour schemes; returns the paths."""
    figures: dict[str, Callable[[], Figure]] = {"replay-bytes": partial(draw_bytes_moved, result)}
    if any(overlap.steps or overlap.blocks for overlap in result.overlaps.values()):
        figures["replay-overlap"] = partial(draw_overlap, result)
    return [
        path
        for name, draw in figures.items()
        for path in plotting.write_figure(draw, folder / name)
    ]


def draw_bytes_moved(result: ReplayResult) -> Figure:
    """MiB per forward over slots, for the first precision: the others are proportional."""
    figure, axes = plotting.new_axes("slots of each layer", "MiB moved a forward")
    lines: dict[tuple[str, str], set[tuple[int, float]]] = {}
    for point in result.points:
        if point.case.precision == result.points[0].case.precision:
            key = (str(point.case.replay_policy), point.case.eviction)
            size = point.traffic.bytes_moved / point.traffic.forwards / MIB
            lines.setdefault(key, set()).add((point.slots, size))
    evictions = list(dict.fromkeys(eviction for _, eviction in lines))
    for (policy, eviction), points in lines.items():
        style = plotting.policy_style(policy)
        axes.plot(
            *zip(*sorted(points), strict=True),
            LINE_STYLES[evictions.index(eviction) % len(LINE_STYLES)],
            color=style.colour,
            marker=style.marker,
            label=f"{policy}, {eviction}" if len(evictions) > 1 else policy,
        )
    axes.set_ylim(bottom=0)
    plotting.add_legend(axes, columns=1)
    return figure


def draw_overlap(result: ReplayResult) -> Figure:
    """The Jaccard index by layer from step to step; from block to block where blocks take one."""
    within = any(overlap.steps for overlap in result.overlaps.values())
    pairs = "from step to step" if within else "from block to block"
    figure, axes = plotting.new_axes("layer with a router", f"experts in common {pairs}")
    for name, overlap in result.overlaps.items():
        values = overlap.step_jaccard if within else overlap.block_jaccard
        style, indices = plotting.policy_style(name), range(1, len(values) + 1)
        axes.plot(indices, values, color=style.colour, marker=style.marker, label=name)
    axes.set_ylim(0, 1)
    axes.locator_params(axis="x", integer=True)
    plotting.add_legend(axes, columns=1)
    return figure
