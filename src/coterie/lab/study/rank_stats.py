"""Rank correlation, and intervals of a mean over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatValues = Sequence[float] | NDArray[np.float64]


def spearman(first: FloatValues, second: FloatValues) -> float:
    """Correlation of the ranks, ties at their mean rank; 0 where one side does not vary."""
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def ranks(values: FloatValues) -> NDArray[np.float64]:
    """From 1, the least first; equal values share the mean of their places."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def mean_interval(by_prompt: FloatValues, *, draws: int = 2000, seed: int = 0) -> list[float]:
    """The middle 95 % of the mean under a bootstrap over prompts, one value each."""
    values = np.asarray(by_prompt, dtype=np.float64)
    indices = np.random.default_rng(seed).integers(0, len(values), size=(draws, len(values)))
    low, high = np.quantile(values[indices].mean(axis=1), [0.025, 0.975])
    return [float(low), float(high)]
