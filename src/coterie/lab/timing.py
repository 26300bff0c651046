"""Timing: interleaved calls, medians with quartiles, and the limits of the machine."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar

import numpy as np
import torch

Key = TypeVar("Key", bound=Hashable)
TimedFunction = Callable[[], object]

READ_BYTES = 256 << 20  # several times the cache of most processors
DEFAULT_ROUNDS = 9  # samples of each function
MATRIX_SIZE = 1024  # rows of the matrix product that measures peak arithmetic


@dataclass(frozen=True)
class TimingBudget:
    """The effort of a measurement; a smaller one serves to test an experiment."""

    rounds: int | None = None  # None: the measurement's default
    read_bytes: int = READ_BYTES
    matrix_size: int = MATRIX_SIZE


FULL_BUDGET = TimingBudget()


class TimingStats(TypedDict):
    """Seconds of one function: median, quartiles and number of samples."""

    median: float
    low: float
    high: float
    samples: int


class TimingConditions(TypedDict):
    """The conditions of a measurement.

    ``load`` is the mean number of runnable threads over the last minute, this process's included;
    None if the system does not report it.
    """

    device: str
    threads: int
    cores: int
    load: float | None


class DeviceLimits(TypedDict):
    """The measured peak bandwidth and arithmetic of a device.

    ``reader`` is the fastest read operation; ``flops_per_second`` is by dtype.
    """

    bytes_per_second: float
    reader: str
    flops_per_second: dict[str, float]
    seconds: dict[str, TimingStats]


class LatencyFit(TypedDict):
    """t = t0 + b T + a P: T unique experts, P token-expert pairs (DES, Eq. 2)."""

    t0: float  # seconds
    b: float  # seconds per expert
    a: float  # seconds per pair
    r2: float
    error: float  # median of |predicted - measured| / measured


def timing_stats(samples: Sequence[float]) -> TimingStats:
    """Median and quartiles of samples; raises ValueError if there are none."""
    if not samples:
        raise ValueError("no samples to take the median of")
    low, high = samples[0], samples[0]
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return TimingStats(median=statistics.median(samples), low=low, high=high, samples=len(samples))


def mean_timing_stats(all_stats: Sequence[TimingStats]) -> TimingStats:
    """The mean of several functions' medians and quartiles."""
    return TimingStats(
        median=statistics.fmean(stats["median"] for stats in all_stats),
        low=statistics.fmean(stats["low"] for stats in all_stats),
        high=statistics.fmean(stats["high"] for stats in all_stats),
        samples=sum(stats["samples"] for stats in all_stats),
    )


def time_interleaved(
    functions: Mapping[Key, TimedFunction],
    rounds: int,
    *,
    device: torch.device,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[Key, TimingStats]:
    """Calls every function once per round, in random order: slow periods affect all of them.

    The first round is a warm-up.
    """
    rng = random.Random(0)
    order = list(functions)
    samples_by_key: dict[Key, list[float]] = {key: [] for key in order}
    with torch.inference_mode():
        for round_index in range(rounds + 1):
            rng.shuffle(order)
            for key in order:
                seconds = time_once(functions[key], device)
                if round_index:
                    samples_by_key[key].append(seconds)
            on_progress((round_index + 1) / (rounds + 1))
    return {key: timing_stats(samples) for key, samples in samples_by_key.items()}


def time_once(function: TimedFunction, device: torch.device) -> float:
    """Seconds until the device has finished the call."""
    wait_until_idle(device)
    start = time.perf_counter()
    function()
    wait_until_idle(device)
    return time.perf_counter() - start


def wait_until_idle(device: torch.device) -> None:
    """Waits for an asynchronous device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure_limits(
    device: torch.device, dtypes: Iterable[torch.dtype], budget: TimingBudget = FULL_BUDGET
) -> DeviceLimits:
    """Measures the fastest of torch's read operations, and products of square matrices."""
    matrix_size = budget.matrix_size
    buffer = torch.ones(budget.read_bytes // 4, device=device)
    rows = buffer.view(-1, min(4096, len(buffer)))
    read_functions: dict[str, TimedFunction] = {
        "sum": buffer.sum,
        "dot": lambda: torch.dot(buffer, buffer),
        "matrix times vector": lambda: rows @ rows[0],
    }
    matrices = {
        dtype_name(dtype): torch.ones(matrix_size, matrix_size, dtype=dtype, device=device)
        for dtype in dtypes
    }
    products: dict[str, TimedFunction] = {
        label: (lambda a=a: a @ a) for label, a in matrices.items()
    }
    stats = time_interleaved(
        read_functions | products, budget.rounds or DEFAULT_ROUNDS, device=device
    )
    reader = min(read_functions, key=lambda name: stats[name]["median"])
    return DeviceLimits(
        bytes_per_second=buffer.nbytes / stats[reader]["median"],
        reader=reader,
        flops_per_second={label: 2 * matrix_size**3 / stats[label]["median"] for label in products},
        seconds=stats,
    )


def timing_conditions(device: torch.device) -> TimingConditions:
    """The conditions of the last minute; call this after a measurement."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        load = None
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    return TimingConditions(device=device.type, threads=threads, cores=cores, load=load)


def describe_conditions(machine: TimingConditions) -> str:
    """A text such as "cpu, 2 threads"."""
    return f"{machine['device']}, {pluralize(machine['threads'], 'thread')}"


def load_warnings(machine: TimingConditions) -> list[str]:
    """A warning if other processes used the machine during the measurement."""
    load = machine["load"]
    if load is None or load <= max(machine["cores"], machine["threads"]) + 0.5:
        return []
    return [
        f"The machine was busy: {load:.1f} threads shared its "
        f"{pluralize(machine['cores'], 'core')} during these measurements, so times are too long."
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """A name such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def fit_latency(
    experts: Sequence[float], pairs: Sequence[float], seconds: Sequence[float]
) -> LatencyFit:
    """Least squares over measured layers; raises ValueError if t0, b and a are not determined."""
    measured = np.array(seconds, dtype=np.float64)
    terms = np.stack([np.ones_like(measured), np.array(experts), np.array(pairs)], axis=1)
    scale = np.abs(terms).max(axis=0)
    coefficients, _, rank, _ = np.linalg.lstsq(terms / scale, measured, rcond=1e-9)
    if rank < 3:
        raise ValueError("experts and pairs must vary independently to fit their costs")
    t0, b, a = (float(value) for value in coefficients / scale)
    residuals = terms @ np.array([t0, b, a]) - measured
    variation = float(((measured - measured.mean()) ** 2).sum())
    return LatencyFit(
        t0=t0,
        b=b,
        a=a,
        r2=1 - float((residuals**2).sum()) / variation if variation else 1.0,
        error=float(np.median(np.abs(residuals) / measured)),
    )


def predict_seconds(latency_fit: LatencyFit, experts: float, pairs: float) -> float:
    """Seconds of a layer (DES, Eq. 2)."""
    return latency_fit["t0"] + latency_fit["b"] * experts + latency_fit["a"] * pairs


def pluralize(count: int, noun: str) -> str:
    """A text such as "1 thread" or "2 threads"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
