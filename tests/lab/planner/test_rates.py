"""Predicted times: the overlap is fitted back, and fetches only add time."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.keys import to_json
from coterie.lab.bench.cost_model import overlapped
from coterie.lab.bench.shapes import SHAPES
from coterie.lab.planner.expert_counts import PassCounts
from coterie.lab.planner.measurement import GivenRates, cost_of, measure_copies, measure_rates
from coterie.lab.planner.rates import MachineRates, fitted_overlap
from coterie.lab.replay.hardware_model import HardwareModel

positive = st.floats(1e-4, 1e-1)
TINY = SHAPES["tiny"]
FIT = {"t0": 1e-5, "b": 1e-6, "a": 1e-7, "r2": 1.0, "error": 0.0}
RATES = MachineRates(1e10, 1e11, 1e11, {"int8": FIT}, 0.5, 1e-4, HardwareModel(1e9))
WORK = {"tokens": 32, "num_logits": 16, "positions": 64}


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=6), st.floats(0, 1))
def test_the_overlap_of_layers_is_found_again(
    layers: list[tuple[float, float]], overlap: float
) -> None:
    reads, products = zip(*layers, strict=True)
    seconds = [overlapped(read, product, overlap) for read, product in layers]
    assert fitted_overlap(reads, products, seconds) == pytest.approx(overlap, abs=1e-6)


@given(st.integers(1, 32), st.integers(0, 32))
def test_fetched_experts_only_add_time(used: int, loads: int) -> None:
    cost = cost_of(TINY, "int8")
    counts = PassCounts(np.full((2, 2), used), np.full((2, 2), min(loads, used)), 128)
    resident = replace(counts, loads=0 * counts.loads)
    with_loads, without = (cost.seconds(RATES, each, **WORK) for each in (counts, resident))
    assert with_loads >= without > 0
    assert cost.bytes(64, counts) == cost.bytes(64, resident)


def test_rates_are_measured_and_given_ones_replace_them() -> None:
    doing: list[str] = []
    given = GivenRates(read=3e10, disk=2e9)
    rates = measure_rates(TINY, ("int8",), given, tokens=8, on_progress=doing.append)
    assert rates.copies is not None
    assert (rates.read_bandwidth, rates.copies.link_bandwidth) == (3e10, 2e9)
    json.dumps(to_json(replace(rates, copies=None)), allow_nan=False)
    assert min(rates.matrix_rate, rates.router_rate) > 0
    assert 0 <= rates.overlap <= 1
    assert rates.layer_seconds >= 0
    assert set(rates.experts) == {"int8"}
    assert "timing matrices" in doing


def test_the_clock_of_fetches_is_learnt_and_leaves_no_file(tmp_path) -> None:
    copies = measure_copies(TINY, "int8", tmp_path)
    assert copies.link_bandwidth > 0
    assert list(tmp_path.iterdir()) == []
