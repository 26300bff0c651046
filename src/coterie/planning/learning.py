"""The rates of a machine, learnt from runs that were timed: least squares through the clock.

What a disk gives, and what is left of the memory while it does, wavers from minute to minute. Runs
that rates are learnt from must take turns with those that are foretold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.naming import CoterieError
from coterie.planning.machine import Counts, Machine, Seconds, seconds

TURNS = 200
STEP = 1e-5  # of a derivative
LEAST = 1e-9  # of the error, by which a turn must better it
FIRST = (-2.0, 0.0, 2.0)  # overlaps that are begun with, as logits
WORST = 1e12  # damping at which nothing gets better any more
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Timed:
    """Forwards that were timed: experts used and loaded, [P, L], and seconds [P]."""

    used: Counts
    loads: Counts
    seconds: Seconds


def learnt(runs: Sequence[Timed], size: int) -> Machine:
    """The machine whose clock is nearest to these runs, experts weighing ``size`` bytes.

    Forwards are off in shares of their run's mean, so that short runs count as much as long ones.
    Raises CoterieError where the runs cannot tell reading from computing.
    """
    if not any(run.loads.any() for run in runs):
        raise CoterieError("nothing was loaded in these runs: they tell nothing of a link")
    if len({float(total) for run in runs for total in run.used.sum(-1)}) < 2:
        raise CoterieError("all forwards use as many experts: they tell nothing of the memory")
    scale = min(float(run.seconds.mean()) for run in runs)
    largest = max(float(run.used.sum(-1).mean()) for run in runs) * size
    found = [_descended(runs, size, _guess(largest / scale, scale, first)) for first in FIRST]
    return _machine(min(found, key=lambda point: _error(runs, size, point)))


def off_by(machine: Machine, run: Timed, size: int) -> float:
    """What the clock says of a run over what it took, less 1."""
    told, _ = seconds(machine, run.used, run.loads, size)
    return float(told.sum() / run.seconds.sum()) - 1


def _guess(rate: float, scale: float, overlap: float) -> Vector:
    return np.array([*np.log([2 * rate, rate / 4, scale / 8, scale / 80]), overlap])


def _machine(point: Vector) -> Machine:
    """Of logarithms of memory, link, rest and latency, and the logit of overlap."""
    memory, link, rest, latency = (float(value) for value in np.exp(point[:4]))
    return Machine(link, memory, rest, float(1 / (1 + np.exp(-point[4]))), latency)


def _misses(runs: Sequence[Timed], size: int, point: Vector) -> Vector:
    machine = _machine(point)
    return np.concatenate(
        [
            (seconds(machine, run.used, run.loads, size)[0] - run.seconds) / run.seconds.mean()
            for run in runs
        ]
    )


def _error(runs: Sequence[Timed], size: int, point: Vector) -> float:
    return float((_misses(runs, size, point) ** 2).sum())


def _descended(runs: Sequence[Timed], size: int, point: Vector) -> Vector:
    """Down to the least error near a point (Levenberg and Marquardt)."""
    damping, error = 1e-2, _error(runs, size, point)
    for _ in range(TURNS):
        off = _misses(runs, size, point)
        slopes = [
            (_misses(runs, size, point + STEP * axis) - off) / STEP for axis in np.eye(len(point))
        ]
        slope = np.stack(slopes, axis=1)
        square = slope.T @ slope
        while damping < WORST:
            ridge = damping * np.diag(np.diag(square) + 1e-12)
            step = np.clip(np.linalg.solve(square + ridge, slope.T @ off), -1, 1)
            moved = np.clip(point - step, -60, 60)
            if (better := _error(runs, size, moved)) < error:
                break
            damping *= 4
        else:
            return point
        done = error - better <= LEAST * error
        point, error, damping = moved, better, damping / 3
        if done:
            break
    return point
