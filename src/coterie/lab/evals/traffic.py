"""What a memory that does not hold all experts served, answer by answer, and what that saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from coterie.keys import Key
from coterie.lab.evals.stats import ratio_interval
from coterie.offload.traffic import Traffic


@dataclass(frozen=True)
class AnswerTraffic:
    """Of an answer's forwards, those that write keys among them, or of many answers' together.

    ``vanilla`` is what the unmodified model would have moved under LRU in the same slots on the
    same forwards; None where nobody asked.
    """

    used: Annotated[int, Key("used")]  # experts
    hits: Annotated[int, Key("hits")]  # of these
    bytes_moved: Annotated[int, Key("moved")]  # bytes
    bytes_without_cache: Annotated[int, Key("without_cache")]  # bytes
    bytes_vanilla: Annotated[int | None, Key("vanilla")] = None  # bytes
    wait_seconds: Annotated[float, Key("waited")] = 0.0  # seconds

    @staticmethod
    def from_traffic(traffic: Traffic | None) -> AnswerTraffic | None:
        """None where all experts are in memory."""
        if traffic is None:
            return None
        return AnswerTraffic(
            traffic.experts_used,
            traffic.hits,
            traffic.bytes_moved,
            traffic.bytes_without_cache,
            traffic.vanilla_bytes,
            traffic.stall_seconds,
        )

    def __add__(self, other: AnswerTraffic) -> AnswerTraffic:
        mine, theirs = self.bytes_vanilla, other.bytes_vanilla
        return AnswerTraffic(
            self.used + other.used,
            self.hits + other.hits,
            self.bytes_moved + other.bytes_moved,
            self.bytes_without_cache + other.bytes_without_cache,
            None if mine is None or theirs is None else mine + theirs,
            self.wait_seconds + other.wait_seconds,
        )

    @property
    def hit_rate(self) -> float:
        return self.hits / self.used if self.used else 1.0

    @property
    def saved_vs_vanilla(self) -> float | None:
        """Of what vanilla would have moved there, the share that was not."""
        return 1 - self.bytes_moved / self.bytes_vanilla if self.bytes_vanilla else None


@dataclass(frozen=True)
class TrafficSavings:
    """Of the bytes that a first arm moved for the same items, the share that another did not."""

    value: float
    interval: tuple[float, float]  # bootstrap over items, 95 %


def traffic_savings(
    first: Sequence[AnswerTraffic | None], other: Sequence[AnswerTraffic | None]
) -> TrafficSavings | None:
    """Item by item, those left out that failed in either; None where the first moved nothing."""
    pairs = [(a.bytes_moved, b.bytes_moved) for a, b in zip(first, other, strict=True) if a and b]
    total_before = sum(before for before, _ in pairs)
    if not total_before:
        return None
    before, after = zip(*pairs, strict=True)
    low, high = ratio_interval(after, before)
    return TrafficSavings(1 - sum(after) / total_before, (1 - high, 1 - low))
