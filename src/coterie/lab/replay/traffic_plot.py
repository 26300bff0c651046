"""A run's traffic over its forwards, as one figure and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from coterie.lab import plotting
from coterie.offload.simulated_store import SIMULATED_TIER
from coterie.offload.traffic import Traffic
from coterie.offload.traffic_log import KV_ONLY_KINDS, ForwardTraffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 1 << 20
WIDTH, HEIGHTS = 6.4, (2.6, 1.5, 1.5)  # inches
TIER_COLOURS = (plotting.BLUE, plotting.ORANGE, plotting.GREEN, plotting.PURPLE)
MIN_LABELLED_SHARE = 0.03  # of the axis: what a block's number needs to be told


@dataclass(frozen=True)
class TrafficPoint:
    """One forward of a run: what it moved; where it decoded, the votes it kept and lost."""

    forward: ForwardTraffic
    vote_share: float | None = None
    reuse_loss: float | None = None

    def to_dict(self) -> dict[str, object]:
        """As JSON values; bytes are of all layers."""
        forward, traffic = self.forward, self.forward.traffic
        return {
            "forward": forward.number,
            "kind": forward.kind,
            "blocks": list(forward.blocks),
            "experts_used": traffic.experts_used,
            "hit_rate": traffic.hit_rate,
            "bytes_moved_from": {
                tier: transfer.bytes for tier, transfer in traffic.transfers.items()
            },
            "bytes_without_cache": traffic.bytes_without_cache,
            "bytes_of_vanilla": traffic.vanilla_bytes,
            "stalled": traffic.stall_fraction,
            "seconds": traffic.seconds,
            "vote_mass_kept": self.vote_share,
            "drift": self.reuse_loss,
        }


def write_figures(name: Path, title: str, points: Sequence[TrafficPoint]) -> list[Path]:
    """NAME-light.svg and NAME-dark.svg; returns their paths."""
    paths = []
    for scheme in get_args(plotting.ColourScheme):
        path = name.with_name(f"{name.name}-{scheme}.svg")
        svg = plotting.render_svg(
            lambda: draw_traffic(title, points), name="traffic", scheme=scheme
        )
        path.write_text(svg, encoding="utf-8")
        paths.append(path)
    return paths


def draw_traffic(title: str, points: Sequence[TrafficPoint]) -> Figure:
    """Bytes that came, hits and stalls, votes: one below the other, over the same forwards."""
    fig, (first, *_) = plotting.new_panels(1, columns=1, width=WIDTH, height=sum(HEIGHTS))
    first.remove()
    grid = fig.add_gridspec(3, 1, height_ratios=HEIGHTS)
    bytes_axes, hits_axes, votes_axes = (fig.add_subplot(grid[index]) for index in range(3))
    _draw_bytes(bytes_axes, [item.forward.traffic for item in points])
    _draw_hits(hits_axes, [item.forward.traffic for item in points])
    _draw_votes(votes_axes, points)
    for item in (bytes_axes, hits_axes, votes_axes):
        _draw_blocks(item, points, with_labels=item is bytes_axes)
        item.set_xlim(-0.5, len(points) - 0.5)
        item.locator_params(axis="x", integer=True)
        item.grid(visible=False, axis="x")
    for item in (bytes_axes, hits_axes):
        item.tick_params(labelbottom=False)
    votes_axes.set_xlabel("forward (\u25b4 only writes keys)")
    fig.suptitle(title, x=0.01, ha="left", fontsize=10)
    return fig


def _draw_bytes(axes: Axes, traffics: Sequence[Traffic]) -> None:
    """What came, tier upon tier, and what would have come."""
    indices = range(len(traffics))
    edges = [index - 0.5 for index in (*indices, len(traffics))]
    bottom = [0.0] * len(traffics)
    for tier, colour in zip(_tier_names(traffics), TIER_COLOURS * len(traffics), strict=False):
        sizes = [
            axes.transfers[tier].bytes / MIB if tier in axes.transfers else 0.0 for axes in traffics
        ]
        top = [low + high for low, high in zip(bottom, sizes, strict=True)]
        axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=_tier_label(tier))
        bottom = top
    vanilla_sizes = [traffic.vanilla_bytes for traffic in traffics]
    if all(size is not None for size in vanilla_sizes):
        axes.stairs(
            [(size or 0) / MIB for size in vanilla_sizes], edges, baseline=None, color=plotting.RED,
            linewidth=1.4, label="vanilla with LRU",
        )  # fmt: skip
    axes.stairs(
        [traffic.bytes_without_cache / MIB for traffic in traffics], edges, baseline=None,
        color=plotting.GREY, linestyle=":", linewidth=1.4, label="without a cache",
    )  # fmt: skip
    axes.set_ylabel("MiB moved")
    axes.set_ylim(bottom=0)
    plotting.add_legend(axes, columns=4)


def _draw_hits(axes: Axes, traffics: Sequence[Traffic]) -> None:
    indices = range(len(traffics))
    rates = [traffic.hit_rate for traffic in traffics]
    axes.plot(
        indices,
        rates,
        color=plotting.GREEN,
        marker=_marker(traffics),
        label="experts that were there",
    )
    if any(traffic.stall_seconds for traffic in traffics):
        stall_shares = [traffic.stall_fraction or 0.0 for traffic in traffics]
        axes.plot(
            indices,
            stall_shares,
            color=plotting.RED,
            marker=_marker(traffics),
            label="time waited for others",
        )
    _format_share_axis(axes)


def _draw_votes(axes: Axes, points: Sequence[TrafficPoint]) -> None:
    """Of forwards that decode; the others are routed by nobody's votes, or say nothing of it."""
    kept_shares = [
        (index, point.vote_share)
        for index, point in enumerate(points)
        if point.vote_share is not None
    ]
    axes.plot(*_unzip(kept_shares), color=plotting.BLUE, marker=_marker(points), label="votes kept")
    lost_shares = [
        (index, point.reuse_loss)
        for index, point in enumerate(points)
        if point.reuse_loss is not None
    ]
    if lost_shares:
        axes.plot(
            *_unzip(lost_shares),
            color=plotting.ORANGE,
            marker=_marker(points),
            label="votes lost to drift",
        )
    _format_share_axis(axes)


def _unzip(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [index for index, _ in points], [share for _, share in points]


def _format_share_axis(axes: Axes) -> None:
    axes.set_ylim(-0.04, 1.04)
    plotting.format_percent(axes)
    plotting.add_legend(axes, columns=2)


def _draw_blocks(axes: Axes, points: Sequence[TrafficPoint], *, with_labels: bool) -> None:
    """Every other block stands on a shade; marks on the axis are forwards that only write keys."""
    low, high = axes.get_ylim()
    for block, forwards in groupby(enumerate(points), key=lambda each: each[1].forward.blocks):
        first, *others = [index for index, _ in forwards]
        last = others[-1] if others else first
        if sum(block) % 2:
            axes.axvspan(
                first - 0.5,
                last + 0.5,
                color=plotting.grid_colour(),
                alpha=0.45,
                linewidth=0,
                zorder=0,
            )
        if with_labels and (last + 1 - first) / len(points) >= MIN_LABELLED_SHARE:
            label = f"block {block[0]}" if first == 0 and len(block) == 1 else f"{block[0]}"
            axes.text(
                (first + last) / 2, high - 0.03 * (high - low), label if len(block) == 1 else "",
                ha="center", va="top", fontsize=8, color=plotting.foreground(),
            )  # fmt: skip
    kv_write_indices = [
        index for index, point in enumerate(points) if point.forward.kind in KV_ONLY_KINDS
    ]
    axes.plot(
        kv_write_indices, [0.0] * len(kv_write_indices), "^", color=plotting.foreground(), markersize=3.5, clip_on=False,
        transform=axes.get_xaxis_transform(), zorder=5,
    )  # fmt: skip


def _tier_names(traffics: Sequence[Traffic]) -> list[str]:
    return list(dict.fromkeys(tier for traffic in traffics for tier in traffic.transfers))


def _tier_label(tier: str) -> str:
    return "would come" if tier == SIMULATED_TIER else f"from {tier}"


def _marker(points: Sequence[object]) -> str:
    """A marker where there is room for one."""
    return "o" if len(points) <= 40 else ""
