"""The expert store that keeps every expert in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from coterie.values import ExpertRequest, Slab


@dataclass(frozen=True)
class ResidentExpertStore:
    """One slab per layer that holds all of the layer's experts; nothing is ever fetched."""

    slabs: Mapping[int, Slab]

    traffic_log = None
    capacity = None
    precision_stats = None

    def serve(self, layer: int, request: ExpertRequest) -> Iterator[Slab]:
        del request
        yield self.slabs[layer]

    def resident(self, layer: int) -> Tensor | None:
        del layer
        return None

    def reset(self) -> None:
        """There is no cache to reset."""
