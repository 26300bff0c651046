"""How time is taken: works in turns, medians with quartiles, and what the machine can do."""

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

READ_BYTES = 256 << 20  # bytes: several times the largest cache of most processors
DEFAULT_ROUNDS = 9  # readings of each
MATRIX_SIZE = 1024  # rows of the product that stands for peak arithmetic


@dataclass(frozen=True)
class TimingBudget:
    """How much is done to time a work; less of it to try a chapter out."""

    rounds: int | None = None  # None: as many as the work needs
    read_bytes: int = READ_BYTES
    matrix_size: int = MATRIX_SIZE


FULL_BUDGET = TimingBudget()


class TimingStats(TypedDict):
    """Seconds that one work took: median, quartiles, how many times it was done."""

    median: float
    low: float
    high: float
    samples: int


class TimingConditions(TypedDict):
    """Under which something was timed; ``load`` is how many processes wanted a core over the last
    minute, this one's own threads among them (None where the system does not tell)."""

    device: str
    threads: int
    cores: int
    load: float | None


class DeviceLimits(TypedDict):
    """What the device does at best, as measured: a roof for everything else.

    ``reader`` names the operation that read fastest; ``flops_per_second`` is by dtype.
    """

    bytes_per_second: float
    reader: str
    flops_per_second: dict[str, float]
    seconds: dict[str, TimingStats]


class LatencyFit(TypedDict):
    """t = t0 + b T + a P: T unique experts, P token-expert pairs (DES, Eq. 2)."""

    t0: float  # seconds
    b: float  # seconds an expert
    a: float  # seconds a pair
    r2: float
    error: float  # median of |predicted - measured| / measured


def timing_stats(samples: Sequence[float]) -> TimingStats:
    """Raises ValueError where there are none."""
    if not samples:
        raise ValueError("no samples to take the median of")
    low, high = samples[0], samples[0]
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return TimingStats(median=statistics.median(samples), low=low, high=high, samples=len(samples))


def mean_timing_stats(all_stats: Sequence[TimingStats]) -> TimingStats:
    """Of several works' medians and quartiles: what a mean work takes."""
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
    """Does every work once a round, in an order drawn anew each time: what slows the machine for a
    while slows them all. One round before the first is not kept.
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
    """Seconds until the device is done with it."""
    wait_until_idle(device)
    start = time.perf_counter()
    function()
    wait_until_idle(device)
    return time.perf_counter() - start


def wait_until_idle(device: torch.device) -> None:
    """Wait for a device that works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure_limits(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    budget: TimingBudget = FULL_BUDGET,
) -> DeviceLimits:
    """Read much memory with whatever torch reads fastest; multiply square matrices."""
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
    reader = min(read_functions, key=lambda said: stats[said]["median"])
    return DeviceLimits(
        bytes_per_second=buffer.nbytes / stats[reader]["median"],
        reader=reader,
        flops_per_second={label: 2 * matrix_size**3 / stats[label]["median"] for label in products},
        seconds=stats,
    )


def timing_conditions(device: torch.device) -> TimingConditions:
    """Of the minute that has passed: ask at the end of the work."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        load = None
    cores = os.cpu_count() or 1
    return TimingConditions(
        device=device.type, threads=torch.get_num_threads(), cores=cores, load=load
    )


def describe_conditions(machine: TimingConditions) -> str:
    """As in "cpu, 2 threads"."""
    return f"{machine['device']}, {pluralize(machine['threads'], 'thread')}"


def load_warnings(machine: TimingConditions) -> list[str]:
    """A sentence for whoever reads the times, where others worked on the machine as well."""
    load = machine["load"]
    if load is None or load <= max(machine["cores"], machine["threads"]) + 0.5:
        return []
    return [
        f"The machine was not quiet: {load:.1f} processes wanted its "
        f"{pluralize(machine['cores'], 'core')} while these times were taken, so they are too long."
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """As in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def fit_latency(
    experts: Sequence[float], pairs: Sequence[float], seconds: Sequence[float]
) -> LatencyFit:
    """Least squares over measured layers; raises ValueError where t0, b, a cannot be told apart."""
    measured = np.array(seconds, dtype=np.float64)
    terms = np.stack([np.ones_like(measured), np.array(experts), np.array(pairs)], axis=1)
    scale = np.abs(terms).max(axis=0)
    coefficients, _, rank, _ = np.linalg.lstsq(terms / scale, measured, rcond=1e-9)
    if rank < 3:
        raise ValueError("experts and pairs must vary, each for itself, to fit what each costs")
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
    """Seconds (DES, Eq. 2)."""
    return latency_fit["t0"] + latency_fit["b"] * experts + latency_fit["a"] * pairs


def pluralize(count: int, noun: str) -> str:
    """As in "1 thread", "2 threads"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
