"""Rates fitted to runs predict other runs of the same hardware, with and without noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.errors import ConfigError
from coterie.lab.planner.rate_fit import TimedForwards, fit_rates
from coterie.lab.replay.hardware_model import HardwareModel, predict_seconds
from experiments.offload import format_hardware, validate

SIZE, LAYERS = 3_000_000, 3


def counts(seed: int, most: int, missed: float) -> tuple[np.ndarray, np.ndarray]:
    """Experts used and loaded of 40 forwards; some layers miss none."""
    rng = np.random.default_rng(seed)
    used = rng.integers(most // 2, most, (40, LAYERS))
    return used, rng.binomial(used, missed) * (rng.random(used.shape) < 0.7)


def timed(
    machine: HardwareModel, seed: int, most: int, missed: float, noise: float = 0.0
) -> TimedForwards:
    used, loads = counts(seed, most, missed)
    whole, _ = predict_seconds(machine, used, loads, SIZE)
    wavering = 1 + noise * np.random.default_rng(seed + 1).standard_normal(len(whole))
    return TimedForwards(used, loads, whole * wavering)


machines = st.builds(
    HardwareModel,
    link_bandwidth=st.floats(1e9, 8e9),
    memory_bandwidth=st.floats(2e10, 8e10),
    other_seconds=st.floats(1e-4, 1e-2),
    overlap=st.floats(0.05, 0.95),
    transfer_latency=st.floats(1e-5, 1e-3),
)
MACHINE = HardwareModel(4e9, 4e10, other_seconds=1e-3, overlap=0.6, transfer_latency=5e-4)


def error(hardware: HardwareModel, run: TimedForwards) -> float:
    predicted, _ = predict_seconds(hardware, run.used, run.loads, SIZE)
    return float(predicted.sum() / run.seconds.sum()) - 1


@given(machines, st.integers(0, 2**20))
@law(12)
def test_fitted_rates_predict_other_runs(machine: HardwareModel, seed: int) -> None:
    fitted = fit_rates([timed(machine, seed, 80, 0.2), timed(machine, seed + 9, 30, 0.1)], SIZE)
    for most, missed in ((50, 0.15), (80, 0.1), (25, 0.05)):
        assert abs(error(fitted, timed(machine, seed + 99, most, missed))) < 0.03


def test_noise_changes_predictions_little() -> None:
    runs = [timed(MACHINE, 1, 80, 0.2, 0.1), timed(MACHINE, 2, 30, 0.1, 0.1)]
    fitted = fit_rates(runs, SIZE)
    assert abs(error(fitted, timed(MACHINE, 3, 50, 0.15))) < 0.05
    slower = HardwareModel(2e9, 4e10, other_seconds=1e-3, overlap=0.6, transfer_latency=5e-4)
    assert error(fitted, timed(slower, 3, 50, 0.15)) < -0.2


def test_runs_that_cannot_be_fitted_are_refused() -> None:
    with pytest.raises(ConfigError, match="link"):
        fit_rates([timed(MACHINE, 1, 80, 0.0)], SIZE)
    used, loads = np.full((9, 2), 25), np.ones((9, 2), int)
    with pytest.raises(ConfigError, match="memory"):
        fit_rates([TimedForwards(used, loads, np.full(9, 1e-3))], SIZE)


def test_runs_outside_the_fit_are_validated() -> None:
    runs = {name: timed(MACHINE, seed, 80, 0.2) for seed, name in enumerate("abc")}
    parts = (runs["a"], timed(MACHINE, 9, 30, 0.1))
    columns = ("used", "loads", "seconds")
    runs["a"] = TimedForwards(*(np.concatenate([getattr(p, c) for p in parts]) for c in columns))
    runs["c"] = TimedForwards(runs["c"].used, runs["c"].loads, 2 * runs["c"].seconds)
    record = validate(runs, ["a"], SIZE)
    b, c = (abs(record["runs"][name]["relative_error"]) for name in "bc")
    assert (b < 0.01, c) == (True, pytest.approx(0.5, abs=0.01))
    assert (record["worst"], record["median"]) == (c, pytest.approx((b + c) / 2))
    assert [run["fitted"] for run in record["runs"].values()] == [True, False, False]


def test_a_hardware_model_is_printed_as_options_of_replay() -> None:
    words = format_hardware(MACHINE).split()
    assert words[1::2] == ["4GB/s", "40GB/s", "1", "0.5", "0.6"]
    assert format_hardware(HardwareModel(25e9)).startswith("--link-bandwidth 25GB/s --other-ms 0")
