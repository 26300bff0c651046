"""Runs beside what a replay's clock says of them, its rates learnt from others that took turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from coterie.keys import to_json
from coterie.lab.replay.hardware_model import HardwareModel, format_hardware
from coterie.lab.replay.learning import TimedForwards, fit_rates, relative_error


@dataclass(frozen=True)
class Prediction:
    """A run: seconds of a forward as it was and as it was foretold; ``taught``: the rates were
    learnt from it."""

    name: str
    used_for_fit: bool
    measured_seconds: float
    predicted_seconds: float

    @property
    def relative_error(self) -> float:
        """A share of what it was; above 0 where it was faster than foretold."""
        return self.predicted_seconds / self.measured_seconds - 1

    def to_dict(self) -> dict[str, object]:
        return {
            "run": self.name,
            "rates_learnt_from_it": self.used_for_fit,
            "ms": 1e3 * self.measured_seconds,
            "foretold_ms": 1e3 * self.predicted_seconds,
            "off_by": self.relative_error,
        }


@dataclass(frozen=True)
class ClockValidation:
    """The rates that were learnt, and all runs."""

    hardware: HardwareModel
    predictions: tuple[Prediction, ...]

    @property
    def held_out_errors(self) -> tuple[float, ...]:
        """How far off the others were, without their signs."""
        return tuple(
            abs(prediction.relative_error)
            for prediction in self.predictions
            if not prediction.used_for_fit
        )

    def to_dict(self) -> dict[str, object]:
        return {
            "machine": {**to_json(self.hardware), "as_typed": format_hardware(self.hardware)},
            "worst": max(self.held_out_errors),
            "median": median(self.held_out_errors),
            "runs": [prediction.to_dict() for prediction in self.predictions],
        }


def validate(
    runs: Mapping[str, TimedForwards], fit_names: Collection[str], expert_bytes: int
) -> ClockValidation:
    """Learn from the ``teachers`` among these runs, and foretell all; experts weigh ``size``."""
    hardware = fit_rates([runs[name] for name in fit_names], expert_bytes)
    predictions = []
    for name, run in runs.items():
        measured = float(run.seconds.mean())
        predicted = measured * (1 + relative_error(hardware, run, expert_bytes))
        predictions.append(Prediction(name, name in fit_names, measured, predicted))
    return ClockValidation(hardware, tuple(predictions))


def concatenate_runs(runs: Sequence[TimedForwards]) -> TimedForwards:
    """One after the other."""
    used, loads, seconds = (
        np.concatenate([getattr(run, name) for run in runs])
        for name in ("used", "loads", "seconds")
    )
    return TimedForwards(used, loads, seconds)
