"""Counts of the experts that routed blocks use, added up on the device and read now and then."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from coterie.files import LockedFile
from coterie.telemetry import routing_stats
from coterie.values import Routing, Scores, expert_mask

COLUMNS = 7  # blocks, experts, vanilla experts, kept votes, votes, experts together, forwards


@dataclass(frozen=True)
class LayerCounts:
    """One layer: means over the blocks that the policy routed since the start."""

    layer: int
    blocks: int
    experts: float  # unique experts of a block
    vanilla_experts: float  # of the unmodified model on the same scores
    vote_mass_kept: float
    forward_experts: float  # unique experts of all routed blocks of a forward


class ExpertTotals:
    """Totals of each layer. ``add`` has fixed shapes and does not wait for the device."""

    def __init__(self, layers: tuple[int, ...], device: torch.device) -> None:
        self._rows = {layer: index for index, layer in enumerate(layers)}
        self._totals = torch.zeros(len(layers), COLUMNS, dtype=torch.float64, device=device)

    def add(self, scores: Scores, routing: Routing, routed: Tensor) -> None:
        """Adds the rows ``routed`` [S] of a layer."""
        stats = routing_stats(scores, routing)[:, :4] * routed.unsqueeze(-1)
        rows, _, experts = scores.logits.shape
        ids = routing.topk_ids.view(rows, -1).masked_fill(~routed.unsqueeze(-1), -1)
        columns = (routed.sum(), *stats.sum(0), expert_mask(ids.flatten(), experts).sum())
        total = torch.stack([column.double() for column in (*columns, routed.any())])
        self._totals[self._rows[scores.layer]] += total

    def read(self) -> list[LayerCounts]:
        """The means of each layer; waits for the device. Empty before the first block."""
        return [
            LayerCounts(
                layer=layer,
                blocks=int(blocks),
                experts=experts / blocks,
                vanilla_experts=vanilla / blocks,
                vote_mass_kept=kept / votes if votes else 1.0,
                forward_experts=together / forwards,
            )
            for layer, (blocks, experts, vanilla, kept, votes, together, forwards) in zip(
                self._rows, self._totals.tolist(), strict=True
            )
            if blocks
        ]


def summarize(counts: list[LayerCounts]) -> str:
    """One line for a log."""
    if not counts:
        return "no block was routed yet"

    def mean(name: str) -> float:
        return sum(getattr(each, name) for each in counts) / len(counts)

    return (
        f"{mean('experts'):.2f} experts a layer and block (the model's own routing: "
        f"{mean('vanilla_experts'):.2f}), {mean('forward_experts'):.2f} a layer and forward, "
        f"{mean('vote_mass_kept'):.1%} of votes kept, {max(each.blocks for each in counts)} blocks"
    )


def append_counts(file: Path, counts: list[LayerCounts]) -> None:
    """Adds one line to a file. Raises ConfigError that names a file that cannot be written."""
    with LockedFile(file) as lines:
        lines.append(json.dumps({"layers": [asdict(each) for each in counts]}).encode() + b"\n")
