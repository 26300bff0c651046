"""The rates of a machine, learnt from runs that were timed: least squares through the clock.

What a disk gives, and what is left of the memory while it does, wavers from minute to minute. Runs
that rates are learnt from must take turns with those that are foretold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.errors import CoterieError
from coterie.lab.replay.hardware_model import (
    CountArray,
    HardwareModel,
    SecondsArray,
    predict_seconds,
)

MAX_ITERATIONS = 200
DERIVATIVE_STEP = 1e-5  # of a derivative
MIN_IMPROVEMENT = 1e-9  # of the error, by which a turn must better it
INITIAL_OVERLAPS = (-2.0, 0.0, 2.0)  # overlaps that are begun with, as logits
MAX_DAMPING = 1e12  # damping at which nothing gets better any more
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class TimedForwards:
    """Forwards that were timed: experts used and loaded, [P, L], and seconds [P]."""

    used: CountArray
    loads: CountArray
    seconds: SecondsArray


def fit_rates(runs: Sequence[TimedForwards], expert_bytes: int) -> HardwareModel:
    """The machine whose clock is nearest to these runs, experts weighing ``size`` bytes.

    Forwards are off in shares of their run's mean, so that short runs count as much as long ones.
    Raises CoterieError where the runs cannot tell reading from computing.
    """
    if not any(run.loads.any() for run in runs):
        raise CoterieError("nothing was loaded in these runs: they tell nothing of a link")
    if len({float(total) for run in runs for total in run.used.sum(-1)}) < 2:
        raise CoterieError("all forwards use as many experts: they tell nothing of the memory")
    scale = min(float(run.seconds.mean()) for run in runs)
    max_bytes = max(float(run.used.sum(-1).mean()) for run in runs) * expert_bytes
    fits = [
        _minimise(
            runs, expert_bytes, _initial_parameters(max_bytes / scale, scale, initial_overlap)
        )
        for initial_overlap in INITIAL_OVERLAPS
    ]
    return _to_hardware(min(fits, key=lambda point: _squared_error(runs, expert_bytes, point)))


def relative_error(hardware: HardwareModel, run: TimedForwards, expert_bytes: int) -> float:
    """What the clock says of a run over what it took, less 1."""
    predicted, _ = predict_seconds(hardware, run.used, run.loads, expert_bytes)
    return float(predicted.sum() / run.seconds.sum()) - 1


def _initial_parameters(rate: float, scale: float, overlap: float) -> Vector:
    return np.array([*np.log([2 * rate, rate / 4, scale / 8, scale / 80]), overlap])


def _to_hardware(parameters: Vector) -> HardwareModel:
    """Of logarithms of memory, link, rest and latency, and the logit of overlap."""
    memory_bandwidth, link_bandwidth, other_seconds, latency = (
        float(value) for value in np.exp(parameters[:4])
    )
    return HardwareModel(
        link_bandwidth,
        memory_bandwidth,
        other_seconds,
        float(1 / (1 + np.exp(-parameters[4]))),
        latency,
    )


def _residuals(runs: Sequence[TimedForwards], expert_bytes: int, parameters: Vector) -> Vector:
    hardware = _to_hardware(parameters)
    return np.concatenate(
        [
            (predict_seconds(hardware, run.used, run.loads, expert_bytes)[0] - run.seconds)
            / run.seconds.mean()
            for run in runs
        ]
    )


def _squared_error(runs: Sequence[TimedForwards], expert_bytes: int, parameters: Vector) -> float:
    return float((_residuals(runs, expert_bytes, parameters) ** 2).sum())


def _minimise(runs: Sequence[TimedForwards], expert_bytes: int, parameters: Vector) -> Vector:
    """Down to the least error near a point (Levenberg and Marquardt)."""
    damping, error = 1e-2, _squared_error(runs, expert_bytes, parameters)
    for _ in range(MAX_ITERATIONS):
        residuals = _residuals(runs, expert_bytes, parameters)
        columns = [
            (_residuals(runs, expert_bytes, parameters + DERIVATIVE_STEP * axis) - residuals)
            / DERIVATIVE_STEP
            for axis in np.eye(len(parameters))
        ]
        jacobian = np.stack(columns, axis=1)
        normal_matrix = jacobian.T @ jacobian
        while damping < MAX_DAMPING:
            ridge = damping * np.diag(np.diag(normal_matrix) + 1e-12)
            step = np.clip(np.linalg.solve(normal_matrix + ridge, jacobian.T @ residuals), -1, 1)
            candidate = np.clip(parameters - step, -60, 60)
            if (candidate_error := _squared_error(runs, expert_bytes, candidate)) < error:
                break
            damping *= 4
        else:
            return parameters
        converged = error - candidate_error <= MIN_IMPROVEMENT * error
        parameters, error, damping = candidate, candidate_error, damping / 3
        if converged:
            break
    return parameters
