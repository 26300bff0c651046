"""Rates are learnt from runs: a machine's own clock gives them back, with and without noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policies import law

from coterie.naming import CoterieError
from coterie.planning.learning import Timed, learnt, off_by
from coterie.planning.machine import Machine, seconds

SIZE, LAYERS = 3_000_000, 3


def counts(seed: int, most: int, missed: float) -> tuple[np.ndarray, np.ndarray]:
    """Experts used and loaded of 40 forwards; in some layers nobody is missing."""
    rng = np.random.default_rng(seed)
    used = rng.integers(most // 2, most, (40, LAYERS))
    return used, rng.binomial(used, missed) * (rng.random(used.shape) < 0.7)


def timed(machine: Machine, seed: int, most: int, missed: float, noise: float = 0.0) -> Timed:
    used, loads = counts(seed, most, missed)
    whole, _ = seconds(machine, used, loads, SIZE)
    wavering = 1 + noise * np.random.default_rng(seed + 1).standard_normal(len(whole))
    return Timed(used, loads, whole * wavering)


machines = st.builds(
    Machine,
    link=st.floats(1e9, 8e9),
    memory=st.floats(2e10, 8e10),
    rest=st.floats(1e-4, 1e-2),
    overlap=st.floats(0.05, 0.95),
    latency=st.floats(1e-5, 1e-3),
)


@given(machines, st.integers(0, 2**20))
@law(12)
def test_what_was_learnt_foretells_runs_that_were_not_seen(machine: Machine, seed: int) -> None:
    learned = learnt([timed(machine, seed, 80, 0.2), timed(machine, seed + 9, 30, 0.1)], SIZE)
    for most, missed in ((50, 0.15), (80, 0.1), (25, 0.05)):
        assert abs(off_by(learned, timed(machine, seed + 99, most, missed), SIZE)) < 0.03


def test_noise_moves_what_is_foretold_by_little() -> None:
    machine = Machine(4e9, 4e10, rest=1e-3, overlap=0.6, latency=5e-4)
    runs = [timed(machine, 1, 80, 0.2, 0.1), timed(machine, 2, 30, 0.1, 0.1)]
    learned = learnt(runs, SIZE)
    assert abs(off_by(learned, timed(machine, 3, 50, 0.15), SIZE)) < 0.05
    slower = Machine(2e9, 4e10, rest=1e-3, overlap=0.6, latency=5e-4)
    assert off_by(learned, timed(slower, 3, 50, 0.15), SIZE) < -0.2


def test_runs_that_tell_nothing_are_refused() -> None:
    machine = Machine(4e9, 4e10)
    with pytest.raises(CoterieError, match="nothing of a link"):
        learnt([timed(machine, 1, 80, 0.0)], SIZE)
    used, loads = np.full((9, 2), 25), np.ones((9, 2), int)
    with pytest.raises(CoterieError, match="nothing of the memory"):
        learnt([Timed(used, loads, np.full(9, 1e-3))], SIZE)
