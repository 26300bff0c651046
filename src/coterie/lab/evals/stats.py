"""Confidence intervals, paired tests for binary outcomes, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
RATIO_RESAMPLES, SEED = 2000, 0
MAX_CELLS = 1 << 22  # random numbers per draw
FloatValues = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Proportion:
    """A number of successes among ``n`` with its Wilson interval."""

    successes: int
    n: int

    @property
    def value(self) -> float:
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (1927)."""
        p, n = self.value, self.n
        middle = (p + Z_95 * Z_95 / (2 * n)) / (1 + Z_95 * Z_95 / n)
        half = Z_95 / (1 + Z_95 * Z_95 / n) * math.sqrt(p * (1 - p) / n + Z_95 * Z_95 / (4 * n * n))
        # At 0 or n successes the exact end is p itself; rounding must not exclude it.
        return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))


@dataclass(frozen=True)
class PairedDifference:
    """The difference between two policies on the same items: second minus first."""

    gained: int  # wrong in the first, correct in the second
    lost: int  # correct in the first, wrong in the second
    n: int

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided p: a sign test on the changed items."""
        changed = self.gained + self.lost
        tail = sum(math.comb(changed, i) for i in range(min(self.gained, self.lost) + 1))
        return min(1.0, 2 * tail / 2**changed)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % score interval of Tango (Statistics in Medicine 17, 1998).

        Unlike a bootstrap interval it has a positive width if no answer changed.
        """
        low = -_score_bound(self.lost, self.gained, self.n)
        return low, _score_bound(self.gained, self.lost, self.n)


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> PairedDifference:
    """Compares two lists of outcomes, item by item.

    Raises ValueError if the lists are empty or differ in length.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired lists of {len(first)} and {len(second)} items")
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    return PairedDifference(gained, lost, len(first))


def unchanged_bound(n: int) -> float:
    """The end of the score interval of ``n`` items with no changed answer."""
    return Z_95**2 / (n + Z_95**2)


def _score_bound(gained: int, lost: int, n: int) -> float:
    """The largest difference with a score statistic of at most ``Z_95``, by bisection."""
    low, high = (gained - lost) / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        inside = _score_statistic(middle, gained, lost, n) <= Z_95
        low, high = (middle, high) if inside else (low, middle)
    return low


def _score_statistic(difference: float, gained: int, lost: int, n: int) -> float:
    """Distance of the observed difference from ``difference``, in standard errors."""
    variance = difference * (1 - difference)
    linear_term = (2 * n - gained + lost) * difference - gained - lost
    discriminant = max(0.0, linear_term * linear_term + 8 * n * lost * variance)
    lost_rate = (math.sqrt(discriminant) - linear_term) / (4 * n)
    scale = n * (2 * lost_rate + variance)
    return (n * difference - gained + lost) / math.sqrt(scale) if scale > 0 else 0.0


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of sum(parts) / sum(wholes): a seeded bootstrap over prompts."""
    rng, n = np.random.default_rng(SEED), len(parts)
    numerators, denominators = np.asarray(parts, dtype=float), np.asarray(wholes, dtype=float)
    ratios: list[float] = []
    while len(ratios) < RATIO_RESAMPLES:
        sample = rng.integers(0, n, (min(RATIO_RESAMPLES - len(ratios), max(1, MAX_CELLS // n)), n))
        sums = denominators[sample].sum(1)
        ratios += (numerators[sample].sum(1) / np.where(sums > 0, sums, 1.0)).tolist()
    return central_interval(ratios)


def spearman(first: FloatValues, second: FloatValues) -> float:
    """Spearman's rank correlation, with mean ranks for ties; 0 where one side is constant."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def ranks(values: FloatValues) -> NDArray[np.float64]:
    """Ranks from 1, ascending; equal values share their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def mean_interval(by_prompt: FloatValues, *, draws: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean, by a bootstrap over prompts (one value each)."""
    values = np.asarray(by_prompt, dtype=np.float64)
    indices = np.random.default_rng(SEED).integers(0, len(values), size=(draws, len(values)))
    return central_interval(values[indices].mean(axis=1))


def central_interval(samples: FloatValues) -> tuple[float, float]:
    """The central 95 % of samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def holm_adjust(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values for the number of comparisons (Holm 1979)."""
    adjusted, running_max = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        running_max = max(running_max, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running_max
    return adjusted
