"""What the engine and the lab need of an expert store beyond serving."""

from __future__ import annotations

from typing import Protocol

from coterie.offload.precision_stats import PrecisionStats
from coterie.offload.traffic import Traffic
from coterie.offload.traffic_log import TrafficLog
from coterie.values import ExpertStore


class TrackedExpertStore(ExpertStore, Protocol):
    """An expert store that reports what it fetches."""

    @property
    def traffic_log(self) -> TrafficLog | None:
        """The log of its fetches; None where every expert is always in memory."""
        ...

    @property
    def precision_stats(self) -> PrecisionStats | None:
        """The use of each precision; None where all experts have one precision."""
        ...

    def reset(self) -> None:
        """Return to the initial state: an empty cache, or the warm-start experts."""
        ...


def total_traffic(store: TrackedExpertStore) -> Traffic:
    """Traffic of all forwards so far; zero for a store that never fetches."""
    if store.traffic_log is None:
        return Traffic(forwards=0, expert_bytes=0, experts_used=0, hits=0)
    return store.traffic_log.traffic()
