"""Intervals and paired tests for right-or-wrong answers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Share:
    """A count of right answers with its Wilson interval."""

    right: int
    n: int

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927)."""
        p, n = self.value, self.n
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        # At 0 and n of n the exact end is the share itself, which rounding may pass by.
        return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


@dataclass(frozen=True)
class Paired:
    """The difference between two policies on the same items: second minus first."""

    gained: int  # wrong before, right now
    lost: int  # right before, wrong now
    n: int
    interval: tuple[float, float]  # bootstrap, 95 %

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p: a sign test on the items that changed."""
        changed = self.gained + self.lost
        tail = sum(math.comb(changed, i) for i in range(min(self.gained, self.lost) + 1))
        return min(1.0, 2 * tail / 2**changed)


def paired(
    first: Sequence[bool], second: Sequence[bool], *, draws: int = 2000, seed: int = 0
) -> Paired:
    """Compare two lists of right answers, item by item.

    Raises ValueError when the lists are empty or differ in length.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired lists of {len(first)} and {len(second)} items")
    changes = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    n = len(changes)
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(changes, k=n)) / n for _ in range(draws))
    interval = means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
    return Paired(changes.count(1), changes.count(-1), n, interval)
