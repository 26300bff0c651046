"""Fits a replay's hardware model to timed forwards.

Disk and memory bandwidth change within minutes: forwards to fit must alternate with the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ConfigError
from coterie.lab.replay.hardware_model import (
    CountArray,
    HardwareModel,
    SecondsArray,
    predict_seconds,
)

MAX_ITERATIONS = 200
DERIVATIVE_STEP = 1e-5
MIN_IMPROVEMENT = 1e-9  # relative, of the squared error
INITIAL_OVERLAPS = (-2.0, 0.0, 2.0)  # as logits
MAX_DAMPING = 1e12
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class TimedForwards:
    """Experts used and loaded by timed forwards, [P, L], and their seconds, [P]."""

    used: CountArray
    loads: CountArray
    seconds: SecondsArray


def fit_rates(runs: Sequence[TimedForwards], expert_bytes: int) -> HardwareModel:
    """The hardware model with the least squared error, relative to each run's mean time.

    Raises ConfigError where the runs cannot separate loading from computing.
    """
    if not any(run.loads.any() for run in runs):
        raise ConfigError("no run loads an expert, so the link cannot be fitted")
    if len({float(total) for run in runs for total in run.used.sum(-1)}) < 2:
        raise ConfigError("all forwards use as many experts, so memory cannot be fitted")
    scale = min(float(run.seconds.mean()) for run in runs)
    rate = max(float(run.used.sum(-1).mean()) for run in runs) * expert_bytes / scale
    start = np.log([2 * rate, rate / 4, scale / 8, scale / 80])
    fits = [_minimise(runs, expert_bytes, np.append(start, o)) for o in INITIAL_OVERLAPS]
    return _to_hardware(min(fits, key=lambda fit: (_residuals(runs, expert_bytes, fit) ** 2).sum()))


def _to_hardware(parameters: Vector) -> HardwareModel:
    """The rates from logarithms of memory, link, other and latency, and the logit of overlap."""
    memory, link, other, latency = (float(value) for value in np.exp(parameters[:4]))
    return HardwareModel(link, memory, other, float(1 / (1 + np.exp(-parameters[4]))), latency)


def _residuals(runs: Sequence[TimedForwards], expert_bytes: int, parameters: Vector) -> Vector:
    hardware = _to_hardware(parameters)
    predictions = (predict_seconds(hardware, run.used, run.loads, expert_bytes)[0] for run in runs)
    pairs = zip(predictions, (run.seconds for run in runs), strict=True)
    return np.concatenate([(predicted - s) / s.mean() for predicted, s in pairs])


def _minimise(runs: Sequence[TimedForwards], expert_bytes: int, parameters: Vector) -> Vector:
    """The nearest minimum of the squared error (Levenberg-Marquardt)."""
    damping, residuals = 1e-2, _residuals(runs, expert_bytes, parameters)
    for _ in range(MAX_ITERATIONS):
        steps = DERIVATIVE_STEP * np.eye(len(parameters))
        moved = [_residuals(runs, expert_bytes, parameters + step) for step in steps]
        jacobian = (np.stack(moved, axis=1) - residuals[:, None]) / DERIVATIVE_STEP
        normal, error = jacobian.T @ jacobian, residuals @ residuals
        while damping < MAX_DAMPING:
            ridge = damping * np.diag(np.diag(normal) + 1e-12)
            step = np.clip(np.linalg.solve(normal + ridge, jacobian.T @ residuals), -1, 1)
            candidate = np.clip(parameters - step, -60, 60)
            candidate_residuals = _residuals(runs, expert_bytes, candidate)
            if candidate_residuals @ candidate_residuals < error:
                break
            damping *= 4
        else:
            return parameters
        parameters, residuals, damping = candidate, candidate_residuals, damping / 3
        if error - residuals @ residuals <= MIN_IMPROVEMENT * error:
            break
    return parameters
