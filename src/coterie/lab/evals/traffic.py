"""Expert traffic of answers generated with a cache, and the bytes that a policy saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from coterie.keys import Key
from coterie.lab.evals.stats import ratio_interval
from coterie.offload.traffic import Traffic


@dataclass(frozen=True)
class AnswerTraffic:
    """Experts used and bytes moved over one or more answers, passes that write keys included.

    ``bytes_vanilla`` is what the unmodified model would move on the same forwards with an LRU cache
    of the same size; None if it was not counted.
    """

    used: Annotated[int, Key("used")]
    hits: Annotated[int, Key("hits")]
    bytes_moved: Annotated[int, Key("moved")]
    bytes_without_cache: Annotated[int, Key("without_cache")]
    bytes_vanilla: Annotated[int | None, Key("vanilla")] = None
    wait_seconds: Annotated[float, Key("waited")] = 0.0

    @staticmethod
    def from_traffic(traffic: Traffic) -> AnswerTraffic:
        return AnswerTraffic(
            traffic.experts_used, traffic.hits, traffic.bytes_moved, traffic.bytes_without_cache,
            traffic.vanilla_bytes, traffic.stall_seconds,
        )  # fmt: skip

    def __add__(self, other: AnswerTraffic) -> AnswerTraffic:
        totals: dict[str, Any] = {}
        for name in (field.name for field in fields(self)):
            values = getattr(self, name), getattr(other, name)
            totals[name] = None if None in values else sum(values)
        return AnswerTraffic(**totals)

    @property
    def hit_rate(self) -> float:
        return self.hits / self.used if self.used else 1.0

    @property
    def saved_vs_vanilla(self) -> float | None:
        """Fraction of vanilla's bytes on the same forwards that were not moved."""
        return 1 - self.bytes_moved / self.bytes_vanilla if self.bytes_vanilla else None


@dataclass(frozen=True)
class TrafficSavings:
    """Fraction of a first variant's bytes that another did not move for the same items."""

    value: float
    interval: tuple[float, float]  # bootstrap over items, 95 %


def traffic_savings(
    first: Sequence[AnswerTraffic | None], other: Sequence[AnswerTraffic | None]
) -> TrafficSavings | None:
    """Savings over the items that succeeded in both; None if the first moved nothing."""
    pairs = [(a.bytes_moved, b.bytes_moved) for a, b in zip(first, other, strict=True) if a and b]
    if not sum(moved for moved, _ in pairs):
        return None
    before, after = zip(*pairs, strict=True)
    low, high = ratio_interval(after, before)
    return TrafficSavings(1 - sum(after) / sum(before), (1 - high, 1 - low))
