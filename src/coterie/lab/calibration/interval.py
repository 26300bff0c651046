"""How far a reading would move with other prompts: 95 % intervals of paired shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coterie.lab.evals.stats import Proportion


def drop_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """Of the share right before minus the share right after, on the same items.

    The score interval for paired shares (Newcombe, Statistics in Medicine 17, 1998, method 10):
    unlike a bootstrap, it does not shrink to nothing where no item changed.
    """
    n = len(before)
    first, second = Proportion(sum(before), n), Proportion(sum(after), n)
    p, q = first.value, second.value
    (p_low, p_high), (q_low, q_high) = first.interval, second.interval
    r = _correlation(before, after)
    p_down, p_up = p - p_low, p_high - p
    q_down, q_up = q - q_low, q_high - q
    low = math.sqrt(max(0.0, p_down**2 - 2 * r * p_down * q_up + q_up**2))
    high = math.sqrt(max(0.0, p_up**2 - 2 * r * p_up * q_down + q_down**2))
    return max(-1.0, p - q - low), min(1.0, p - q + high)


def _correlation(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Phi of two lists, 0 where one of them never varies."""
    n, num_both = len(before), sum(a and b for a, b in zip(before, after, strict=True))
    correct_before, correct_after = sum(before), sum(after)
    variance = correct_before * (n - correct_before) * correct_after * (n - correct_after)
    return (
        (n * num_both - correct_before * correct_after) / math.sqrt(variance) if variance else 0.0
    )
