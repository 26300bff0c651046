"""The expert traffic of a run over its forwards, as a figure and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.engine.events import Denoised, Event, Result
from coterie.lab import plotting
from coterie.lab.records import write_json
from coterie.offload.simulated_store import SIMULATED_TIER
from coterie.offload.traffic import Traffic
from coterie.offload.traffic_log import KV_ONLY_KINDS, ForwardTraffic, TrafficLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 1 << 20
WIDTH, HEIGHTS = 6.4, (2.6, 1.5, 1.5)  # inches
TIER_COLOURS = (plotting.BLUE, plotting.ORANGE, plotting.GREEN, plotting.PURPLE)
MIN_LABELLED_SHARE = 0.03  # of the axis, for a block to carry its number


@dataclass(frozen=True)
class TrafficPoint:
    """One forward of a run: its traffic, and for a decoding one the votes kept and lost."""

    forward: ForwardTraffic
    vote_share: float | None = None
    reuse_loss: float | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON values; bytes cover all layers."""
        forward, traffic = self.forward, self.forward.traffic
        return {
            "forward": forward.number,
            "kind": forward.kind,
            "blocks": list(forward.blocks),
            "experts_used": traffic.experts_used,
            "hit_rate": traffic.hit_rate,
            "bytes_moved_from": {tier: moved.bytes for tier, moved in traffic.transfers.items()},
            "bytes_without_cache": traffic.bytes_without_cache,
            "bytes_of_vanilla": traffic.vanilla_bytes,
            "stalled": traffic.stall_fraction,
            "seconds": traffic.seconds,
            "vote_mass_kept": self.vote_share,
            "drift": self.reuse_loss,
        }


def write_traffic(
    name: Path, result: Result, events: Sequence[Event], log: TrafficLog, slots: int
) -> list[Path]:
    """Write NAME.json, NAME-light.svg and NAME-dark.svg of an engine's only answer."""
    denoised = (event for event in events if isinstance(event, Denoised))
    points = []
    for forward in log.forwards:
        event = None if forward.kind in KV_ONLY_KINDS else next(denoised)
        votes = () if event is None else (event.vote_mass_kept, event.reuse_vote_loss)
        points.append(TrafficPoint(forward, *votes))
    title = f"{result.policy}, {slots} of {result.experts.total} experts a layer in memory"
    savings = "" if result.traffic is None else result.traffic.describe_savings()
    path = name.with_name(f"{name.name}.json")
    draw = partial(draw_traffic, f"{title}\n{savings}", points)
    documents = [point.to_dict() for point in points]
    write_json(path, {"model": result.model, "policy": result.policy, "forwards": documents})
    return [path, *plotting.write_figure(draw, name, name="traffic")]


def draw_traffic(title: str, points: Sequence[TrafficPoint]) -> Figure:
    """Three panels over the same forwards: MiB moved, hit rate and stalls, votes."""
    fig, (first, *_) = plotting.new_panels(1, columns=1, width=WIDTH, height=sum(HEIGHTS))
    first.remove()
    grid = fig.add_gridspec(3, 1, height_ratios=HEIGHTS)
    bytes_axes, hits_axes, votes_axes = (fig.add_subplot(grid[index]) for index in range(3))
    _draw_bytes(bytes_axes, [item.forward.traffic for item in points])
    _draw_hits(hits_axes, [item.forward.traffic for item in points])
    _draw_votes(votes_axes, points)
    for axes in (bytes_axes, hits_axes, votes_axes):
        _draw_blocks(axes, points, with_labels=axes is bytes_axes)
        axes.set_xlim(-0.5, max(1, len(points)) - 0.5)
        axes.locator_params(axis="x", integer=True)
        axes.grid(visible=False, axis="x")
    for axes in (bytes_axes, hits_axes):
        axes.tick_params(labelbottom=False)
    votes_axes.set_xlabel("forward (\u25b4 only writes keys)")
    fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def _draw_bytes(axes: Axes, traffics: Sequence[Traffic]) -> None:
    """MiB copied from each tier, stacked, and the MiB that vanilla and no cache would copy."""
    edges = [index - 0.5 for index in range(len(traffics) + 1)]
    bottom = [0.0] * len(traffics)
    tiers = list(dict.fromkeys(tier for traffic in traffics for tier in traffic.transfers))
    for tier, colour in zip(tiers, TIER_COLOURS * len(traffics), strict=False):
        transfers = [traffic.transfers.get(tier) for traffic in traffics]
        sizes = [0.0 if transfer is None else transfer.bytes / MIB for transfer in transfers]
        top = [low + size for low, size in zip(bottom, sizes, strict=True)]
        label = "simulated copies" if tier == SIMULATED_TIER else f"from {tier}"
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=label)
        bottom = top
    vanilla = [traffic.vanilla_bytes for traffic in traffics]
    uncached = [traffic.bytes_without_cache / MIB for traffic in traffics]
    line: dict[str, Any] = {"baseline": None, "linewidth": 1.4}
    if None not in vanilla:
        sizes = [(size or 0) / MIB for size in vanilla]
        axes.stairs(sizes, edges, color=plotting.RED, label="vanilla with LRU", **line)
    line["linestyle"] = ":"
    axes.stairs(uncached, edges, color=plotting.GREY, label="without a cache", **line)
    axes.set_ylabel("MiB moved")
    axes.set_ylim(bottom=0)
    plotting.add_legend(axes, columns=4)


def _draw_hits(axes: Axes, traffics: Sequence[Traffic]) -> None:
    indices, marker = range(len(traffics)), _marker(traffics)
    rates = [traffic.hit_rate for traffic in traffics]
    axes.plot(indices, rates, color=plotting.GREEN, marker=marker, label="hit rate")
    if any(traffic.stall_seconds for traffic in traffics):
        shares = [traffic.stall_fraction or 0.0 for traffic in traffics]
        axes.plot(indices, shares, color=plotting.RED, marker=marker, label="time stalled")
    _format_share_axis(axes)


def _draw_votes(axes: Axes, points: Sequence[TrafficPoint]) -> None:
    """Shares of votes of decoding forwards; other forwards have none."""
    kept = [(i, p.vote_share) for i, p in enumerate(points) if p.vote_share is not None]
    lost = [(i, p.reuse_loss) for i, p in enumerate(points) if p.reuse_loss is not None]
    for pairs, colour, label in (
        (kept, plotting.BLUE, "votes of the coreset"),
        (lost, plotting.ORANGE, "votes lost by coreset reuse"),
    ):
        if pairs or pairs is kept:
            indices, shares = [i for i, _ in pairs], [share for _, share in pairs]
            axes.plot(indices, shares, color=colour, marker=_marker(points), label=label)
    _format_share_axis(axes)


def _format_share_axis(axes: Axes) -> None:
    axes.set_ylim(-0.04, 1.04)
    plotting.format_percent(axes)
    plotting.add_legend(axes, columns=2)


def _draw_blocks(axes: Axes, points: Sequence[TrafficPoint], *, with_labels: bool) -> None:
    """Shade every other block; triangles on the axis mark forwards that only write keys."""
    low, high = axes.get_ylim()
    shade: dict[str, Any] = {
        "color": plotting.grid_colour(),
        "alpha": 0.45,
        "linewidth": 0,
        "zorder": 0,
    }
    colour = plotting.foreground()
    for blocks, group in groupby(enumerate(points), key=lambda each: each[1].forward.blocks):
        indices = [index for index, _ in group]
        first, last = indices[0], indices[-1]
        if sum(blocks) % 2:
            axes.axvspan(first - 0.5, last + 0.5, **shade)
        if with_labels and len(blocks) == 1 and len(indices) / len(points) >= MIN_LABELLED_SHARE:
            label = f"block {blocks[0]}" if first == 0 else f"{blocks[0]}"
            place = ((first + last) / 2, high - 0.03 * (high - low))
            axes.text(*place, label, ha="center", va="top", fontsize=8, color=colour)
    marks = [index for index, point in enumerate(points) if point.forward.kind in KV_ONLY_KINDS]
    style: dict[str, Any] = {"color": colour, "markersize": 3.5, "clip_on": False, "zorder": 5}
    if marks:  # an empty line without clipping would take all of the layout
        axes.plot(marks, [0.0] * len(marks), "^", transform=axes.get_xaxis_transform(), **style)


def _marker(points: Sequence[object]) -> str:
    """Markers only where they have room."""
    return "o" if len(points) <= 40 else ""
