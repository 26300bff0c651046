"""Rates are learnt from runs: a machine's own clock gives them back, with and without noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie.cli.replay import hardware_models as as_typed
from coterie.errors import CoterieError
from coterie.lab.replay.hardware_model import HardwareModel, format_hardware, predict_seconds
from coterie.lab.replay.judging import concatenate_runs, validate
from coterie.lab.replay.learning import TimedForwards, fit_rates, relative_error

SIZE, LAYERS = 3_000_000, 3


def counts(seed: int, most: int, missed: float) -> tuple[np.ndarray, np.ndarray]:
    """Experts used and loaded of 40 forwards; in some layers nobody is missing."""
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
    link=st.floats(1e9, 8e9),
    memory=st.floats(2e10, 8e10),
    rest=st.floats(1e-4, 1e-2),
    overlap=st.floats(0.05, 0.95),
    latency=st.floats(1e-5, 1e-3),
)


@given(machines, st.integers(0, 2**20))
@law(12)
def test_what_was_learnt_foretells_runs_that_were_not_seen(
    machine: HardwareModel, seed: int
) -> None:
    learned = fit_rates([timed(machine, seed, 80, 0.2), timed(machine, seed + 9, 30, 0.1)], SIZE)
    for most, missed in ((50, 0.15), (80, 0.1), (25, 0.05)):
        assert abs(relative_error(learned, timed(machine, seed + 99, most, missed), SIZE)) < 0.03


def test_noise_moves_what_is_foretold_by_little() -> None:
    machine = HardwareModel(4e9, 4e10, other_seconds=1e-3, overlap=0.6, transfer_latency=5e-4)
    runs = [timed(machine, 1, 80, 0.2, 0.1), timed(machine, 2, 30, 0.1, 0.1)]
    learned = fit_rates(runs, SIZE)
    assert abs(relative_error(learned, timed(machine, 3, 50, 0.15), SIZE)) < 0.05
    slower = HardwareModel(2e9, 4e10, other_seconds=1e-3, overlap=0.6, transfer_latency=5e-4)
    assert relative_error(learned, timed(slower, 3, 50, 0.15), SIZE) < -0.2


def test_runs_that_tell_nothing_are_refused() -> None:
    machine = HardwareModel(4e9, 4e10)
    with pytest.raises(CoterieError, match="nothing of a link"):
        fit_rates([timed(machine, 1, 80, 0.0)], SIZE)
    used, loads = np.full((9, 2), 25), np.ones((9, 2), int)
    with pytest.raises(CoterieError, match="nothing of the memory"):
        fit_rates([TimedForwards(used, loads, np.full(9, 1e-3))], SIZE)


def test_runs_that_were_not_learnt_from_are_judged() -> None:
    machine = HardwareModel(4e9, 4e10, other_seconds=1e-3, overlap=0.6, transfer_latency=5e-4)
    runs = {name: timed(machine, seed, 80, 0.2) for seed, name in enumerate("abc")}
    runs["a"] = concatenate_runs([runs["a"], timed(machine, 9, 30, 0.1)])
    slow = runs["c"]
    runs["c"] = TimedForwards(slow.used, slow.loads, 2 * slow.seconds)
    found = validate(runs, ["a"], SIZE)
    assert [run.used_for_fit for run in found.predictions] == [True, False, False]
    assert len(runs["a"].seconds) == 80
    b, c = found.held_out_errors
    assert (b < 0.01, c) == (True, pytest.approx(0.5, abs=0.01))
    told = found.to_dict()
    assert (told["worst"], told["median"]) == (c, pytest.approx((b + c) / 2))


def test_a_machine_is_told_as_a_replay_takes_it() -> None:
    machine = HardwareModel(4e9, 4e10, other_seconds=1e-3, overlap=0.6, transfer_latency=5e-4)
    names, values = format_hardware(machine).split()[::2], format_hardware(machine).split()[1::2]
    assert names == ["--link", "--memory", "--rest", "--latency", "--overlap"]
    link, memory, *numbers = values
    rest, latency, overlap = map(float, numbers)
    assert as_typed(link, memory, rest, latency_ms=latency, overlap=overlap) == {link: machine}
    assert format_hardware(HardwareModel(25e9)) == "--link 25GB/s --rest 0 --latency 0 --overlap 1"
