"""What the engine and the lab need of an expert store beyond serving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from coterie.offload.traffic import Traffic
from coterie.offload.traffic_log import TrafficLog
from coterie.values import ExpertStore


@dataclass(frozen=True)
class PrecisionCounts:
    """How a store with two precisions served its experts; means over layers and forwards."""

    high_format: str
    low_format: str
    high_slots: int  # per layer
    low_slots: int
    high_precision_share: float  # share of the votes served in high precision
    promotions: int
    loss_bound: float | None  # None where the quantization errors are unknown
    loss_rms: float | None

    def to_dict(self) -> dict[str, object]:
        """As JSON, under its stable keys."""
        return {
            "fine": self.high_format,
            "coarse": self.low_format,
            "fine_slots": self.high_slots,
            "coarse_slots": self.low_slots,
            "votes_fine": self.high_precision_share,
            "votes_coarse": 1 - self.high_precision_share,
            "upgrades": self.promotions,
            "loss_bound": self.loss_bound,
            "loss_rms": self.loss_rms,
        }


class TrackedExpertStore(ExpertStore, Protocol):
    """An expert store that reports what it fetches."""

    @property
    def traffic_log(self) -> TrafficLog | None:
        """The log of its fetches; None where every expert is always in memory."""
        ...

    @property
    def capacity(self) -> int | None:
        """Slots per layer, of all precisions; None where every expert is always in memory."""
        ...

    @property
    def precision_counts(self) -> PrecisionCounts | None:
        """None where all experts have one precision."""
        ...

    def reset(self) -> None:
        """Return to the initial state: an empty cache, or the warm-start experts."""
        ...


def total_traffic(store: TrackedExpertStore) -> Traffic:
    """Traffic of all forwards so far; zero for a store that never fetches."""
    if store.traffic_log is None:
        return Traffic(forwards=0, expert_bytes=0, experts_used=0, hits=0)
    return store.traffic_log.traffic()
