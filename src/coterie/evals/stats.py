"""Intervals and paired tests for right-or-wrong answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from coterie.keys import Key

Z = 1.959963984540054  # of a two-sided 95 % interval
DRAWS = 10_000
RATIO_DRAWS, SEED = 2000, 0
CELLS = 1 << 22  # numbers drawn at once


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

    gained: Annotated[int, Key("gained")]  # wrong before, right now
    lost: Annotated[int, Key("lost")]  # right before, wrong now
    n: Annotated[int, Key("n")]
    # bootstrap over items, 95 %, between percentiles
    interval: Annotated[tuple[float, float], Key("interval")]

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p: a sign test on the items that changed."""
        changed = self.gained + self.lost
        tail = sum(math.comb(changed, i) for i in range(min(self.gained, self.lost) + 1))
        return min(1.0, 2 * tail / 2**changed)

    @property
    def score_interval(self) -> tuple[float, float]:
        """The 95 % score interval of Tango (Statistics in Medicine 17, 1998), which does not shrink
        to nothing where no answer changed."""
        low = -_furthest(self.lost, self.gained, self.n)
        return low, _furthest(self.gained, self.lost, self.n)


def paired(
    first: Sequence[bool], second: Sequence[bool], *, draws: int = DRAWS, seed: int = 0
) -> Paired:
    """Compare two lists of right answers, item by item.

    Raises ValueError when the lists are empty or differ in length.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired lists of {len(first)} and {len(second)} items")
    n = len(first)
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    # Items drawn with replacement count as often as a multinomial says: three kinds, one draw.
    counts = np.random.default_rng(seed).multinomial(
        n, [gained / n, lost / n, (n - gained - lost) / n], size=draws
    )
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / n, [0.025, 0.975])
    return Paired(gained, lost, n, (float(low), float(high)))


def _furthest(gained: int, lost: int, n: int) -> float:
    """The greatest difference from which so many changes are no further than ``Z``."""
    near, far = (gained - lost) / n, 1.0
    for _ in range(60):
        middle = (near + far) / 2
        inside = _distance(middle, gained, lost, n) <= Z
        near, far = (middle, far) if inside else (near, middle)
    return near


def _distance(difference: float, gained: int, lost: int, n: int) -> float:
    """Standard errors, under ``difference``, from what was found up to it."""
    spare = difference * (1 - difference)
    b = (2 * n - gained + lost) * difference - gained - lost
    likely = (math.sqrt(max(0.0, b * b + 8 * n * lost * spare)) - b) / (4 * n)  # of being lost
    spread = n * (2 * likely + spare)
    return (n * difference - gained + lost) / math.sqrt(spread) if spread > 0 else 0.0


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """Of sum(parts) / sum(wholes), prompt by prompt: bootstrap over prompts, seeded."""
    rng, n = np.random.default_rng(SEED), len(parts)
    part, whole = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    found: list[float] = []
    while len(found) < RATIO_DRAWS:
        drawn = rng.integers(0, n, (min(RATIO_DRAWS - len(found), max(1, CELLS // n)), n))
        sums = whole[drawn].sum(1)
        found += (part[drawn].sum(1) / np.where(sums > 0, sums, 1.0)).tolist()
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def holm(ps: Sequence[float]) -> list[float]:
    """p values of several comparisons, each raised so that all hold together (Holm 1979)."""
    raised, least = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
        raised[index] = least
    return raised
