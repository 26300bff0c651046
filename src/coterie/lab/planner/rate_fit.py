"""Fits a replay's hardware model to timed forwards, and validates it on forwards left out.

Disk and memory bandwidth change within minutes: forwards to fit must alternate with the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ConfigError
from coterie.keys import to_json
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


@dataclass(frozen=True)
class RateValidation:
    """The fitted hardware model, and measured and predicted seconds of a forward by run."""

    hardware: HardwareModel
    fitted: frozenset[str]  # runs that the model was fitted to
    measured: Mapping[str, float]
    predicted: Mapping[str, float]

    def relative_error(self, name: str) -> float:
        return self.predicted[name] / self.measured[name] - 1

    @property
    def held_out_errors(self) -> list[float]:
        return [abs(self.relative_error(n)) for n in self.measured if n not in self.fitted]

    def to_dict(self) -> dict[str, object]:
        return {
            "machine": {**to_json(self.hardware), "as_typed": format_hardware(self.hardware)},
            "worst": max(self.held_out_errors),
            "median": median(self.held_out_errors),
            "runs": {name: self._run_dict(name) for name in self.measured},
        }

    def _run_dict(self, name: str) -> dict[str, object]:
        times = {"ms": 1e3 * self.measured[name], "predicted_ms": 1e3 * self.predicted[name]}
        return {"fitted": name in self.fitted, **times, "relative_error": self.relative_error(name)}


def validate(
    runs: Mapping[str, TimedForwards], fit_names: Collection[str], expert_bytes: int
) -> RateValidation:
    """Fit the runs of these names, and predict all."""
    hardware = fit_rates([runs[name] for name in fit_names], expert_bytes)
    seconds = {name: float(run.seconds.mean()) for name, run in runs.items()}
    predicted = {
        name: float(predict_seconds(hardware, run.used, run.loads, expert_bytes)[0].mean())
        for name, run in runs.items()
    }
    return RateValidation(hardware, frozenset(fit_names), seconds, predicted)


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


def format_hardware(hardware: HardwareModel) -> str:
    """The options of `coterie replay` for this hardware model."""
    memory = hardware.memory_bandwidth
    options = {
        "--link-bandwidth": f"{hardware.link_bandwidth / 1e9:.3g}GB/s",
        "--memory-bandwidth": None if memory is None else f"{memory / 1e9:.3g}GB/s",
        "--other-ms": f"{1e3 * hardware.other_seconds:.3g}",
        "--transfer-latency-ms": f"{1e3 * hardware.transfer_latency:.3g}",
        "--overlap": f"{hardware.overlap:.3g}",
    }
    return " ".join(f"{flag} {value}" for flag, value in options.items() if value is not None)


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
