"""What a memory that does not hold all experts served, answer by answer, and what that saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from coterie.evals.stats import ratio_interval
from coterie.experts.traffic import Traffic
from coterie.keys import Key


@dataclass(frozen=True)
class Served:
    """Of an answer's forwards, those that write keys among them, or of many answers' together.

    ``vanilla`` is what the unmodified model would have moved under LRU in the same slots on the
    same forwards; None where nobody asked.
    """

    used: Annotated[int, Key("used")]  # experts
    hits: Annotated[int, Key("hits")]  # of these
    moved: Annotated[int, Key("moved")]  # bytes
    without_cache: Annotated[int, Key("without_cache")]  # bytes
    vanilla: Annotated[int | None, Key("vanilla")] = None  # bytes
    waited: Annotated[float, Key("waited")] = 0.0  # seconds

    @staticmethod
    def of(traffic: Traffic | None) -> Served | None:
        """None where all experts are in memory."""
        if traffic is None:
            return None
        return Served(
            traffic.used,
            traffic.hits,
            traffic.bytes_moved,
            traffic.bytes_without_cache,
            traffic.bytes_of_vanilla,
            traffic.waited,
        )

    def __add__(self, other: Served) -> Served:
        mine, theirs = self.vanilla, other.vanilla
        return Served(
            self.used + other.used,
            self.hits + other.hits,
            self.moved + other.moved,
            self.without_cache + other.without_cache,
            None if mine is None or theirs is None else mine + theirs,
            self.waited + other.waited,
        )

    @property
    def hit_rate(self) -> float:
        return self.hits / self.used if self.used else 1.0

    @property
    def saved_on_same_forwards(self) -> float | None:
        """Of what vanilla would have moved there, the share that was not."""
        return 1 - self.moved / self.vanilla if self.vanilla else None


@dataclass(frozen=True)
class Saved:
    """Of the bytes that a first arm moved for the same items, the share that another did not."""

    value: float
    interval: tuple[float, float]  # bootstrap over items, 95 %


def saved(first: Sequence[Served | None], other: Sequence[Served | None]) -> Saved | None:
    """Item by item, those left out that failed in either; None where the first moved nothing."""
    both = [(a.moved, b.moved) for a, b in zip(first, other, strict=True) if a and b]
    whole = sum(before for before, _ in both)
    if not whole:
        return None
    before, after = zip(*both, strict=True)
    low, high = ratio_interval(after, before)
    return Saved(1 - sum(after) / whole, (1 - high, 1 - low))
