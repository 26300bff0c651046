"""Timings and their fits, and the routings that are timed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.lab import timing
from coterie.lab.bench import routings
from coterie.lab.bench.shapes import PAPER_LAYERS, LayerShape
from coterie.lab.timing import TimingStats
from coterie.values import RouterSpec

CPU = torch.device("cpu")
ROUTER = RouterSpec(experts=64, k=3, activation="softmax", renormalise=True)
positive = st.floats(1e-6, 1e-2)


@given(t0=positive, b=positive, a=positive, seed=st.integers(0, 99))
def test_fit_recovers_the_coefficients(t0: float, b: float, a: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    experts = torch.randint(8, 257, (12,), generator=draw).tolist()
    pairs = torch.randint(64, 513, (12,), generator=draw).tolist()
    seconds = [t0 + b * e + a * p for e, p in zip(experts, pairs, strict=True)]
    found = timing.fit_latency(experts, pairs, seconds)
    assert found["b"] == pytest.approx(b, rel=1e-5, abs=1e-9)
    assert found["a"] == pytest.approx(a, rel=1e-5, abs=1e-9)
    assert found["t0"] == pytest.approx(t0, rel=1e-3, abs=1e-6)
    assert found["r2"] == pytest.approx(1.0)
    assert found["error"] == pytest.approx(0.0, abs=1e-6)
    assert timing.predict_seconds(found, 100, 256) == pytest.approx(t0 + 100 * b + 256 * a)


def test_r2_falls_without_a_linear_relation() -> None:
    experts, pairs = [8, 16, 32, 64, 96, 128], [64, 128, 64, 128, 64, 128]
    straight = timing.fit_latency(experts, pairs, [1.0, 2.0, 4.0, 8.0, 12.0, 16.0])
    crooked = timing.fit_latency(experts, pairs, [9.0, 2.0, 1.0, 14.0, 5.0, 2.0])
    assert straight["r2"] > 0.99
    assert crooked["r2"] < 0.9


def test_fit_refuses_degenerate_points() -> None:
    with pytest.raises(ValueError, match="must vary"):
        timing.fit_latency([8, 16, 32], [256, 256, 256], [1.0, 2.0, 3.0])


def test_timing_stats_have_median_and_quartiles() -> None:
    assert timing.timing_stats([5.0, 1.0, 4.0, 2.0, 3.0]) == TimingStats(
        median=3, low=2, high=4, samples=5
    )
    assert timing.timing_stats([2.0]) == TimingStats(median=2, low=2, high=2, samples=1)
    with pytest.raises(ValueError, match="no samples"):
        timing.timing_stats([])


def test_functions_are_timed_in_turns() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    taken = timing.time_interleaved(works, 4, device=CPU)
    assert [each["samples"] for each in taken.values()] == [4, 4, 4]
    rounds = [sorted(calls[at : at + 3]) for at in range(0, 15, 3)]
    assert rounds == [["a", "b", "c"]] * 5


@pytest.mark.parametrize(("load", "quiet"), [(None, True), (2.4, True), (9.1, False)])
def test_busy_machine_gives_a_warning(load: float | None, quiet: bool) -> None:
    there = timing.TimingConditions(device="cpu", threads=2, cores=2, load=load)
    told = timing.load_warnings(there)
    assert (told == []) == quiet
    assert all("9.1 threads shared its 2 cores" in each for each in told)


# Routings that are timed


@given(tokens=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_balanced_routing_uses_exactly_that_many_experts(
    tokens: int, share: float, seed: int
) -> None:
    most = min(tokens * ROUTER.k, ROUTER.experts)
    used = ROUTER.k + round(share * (most - ROUTER.k))
    draw = torch.Generator().manual_seed(seed)
    routing = routings.balanced_routing(ROUTER, tokens, used, draw, CPU)
    load = torch.bincount(routing.topk_ids.flatten(), minlength=ROUTER.experts)
    assert int(routing.used.sum()) == int((load > 0).sum()) == used
    assert routing.topk_ids.shape == (tokens, ROUTER.k)
    assert all(len(set(row)) == ROUTER.k for row in routing.topk_ids.tolist())
    assert load[load > 0].max() - load[load > 0].min() <= 1


@pytest.mark.parametrize("used", [2, 13, 65])
def test_impossible_routing_is_refused(used: int) -> None:
    with pytest.raises(ValueError, match="cannot use"):
        routings.balanced_routing(ROUTER, 4, used, torch.Generator(), CPU)


@pytest.mark.parametrize("shape", PAPER_LAYERS, ids=lambda shape: shape.name)
def test_skewed_router_uses_the_published_experts(shape: LayerShape) -> None:
    bend = routings.find_skew(shape.router, shape.unique_experts)
    assert routings.mean_unique_experts(shape.router, 32, bend, 8) == pytest.approx(
        shape.unique_experts, abs=2
    )
    assert routings.mean_unique_experts(shape.router, 1, bend, 8) == shape.router.k


def test_large_shapes_are_the_published_ones() -> None:
    sizes = {shape.name: shape.bytes // shape.router.experts for shape in PAPER_LAYERS}
    assert sizes == {"LLaDA2.0-mini": 6_291_456, "LLaDA-MoE": 12_582_912}
