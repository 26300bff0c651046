"""Rank correlation, and intervals from samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatValues = Sequence[float] | NDArray[np.float64]


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


def mean_interval(by_prompt: FloatValues, *, draws: int = 2000, seed: int = 0) -> list[float]:
    """The 95 % interval of the mean, by a bootstrap over prompts (one value each)."""
    values = np.asarray(by_prompt, dtype=np.float64)
    indices = np.random.default_rng(seed).integers(0, len(values), size=(draws, len(values)))
    return central_interval(values[indices].mean(axis=1))


def central_interval(samples: FloatValues) -> list[float]:
    """The central 95 % of samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return [float(low), float(high)]
