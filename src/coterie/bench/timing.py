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
Work = Callable[[], object]

READ = 256 << 20  # bytes: several times the largest cache of most processors
PROBES = 9  # readings of each
SQUARE = 1024  # rows of the product that stands for peak arithmetic


@dataclass(frozen=True)
class Pace:
    """How much is done to time a work; less of it to try a chapter out."""

    rounds: int | None = None  # None: as many as the work needs
    read: int = READ
    square: int = SQUARE


FULL = Pace()


class Spread(TypedDict):
    """Seconds that one work took: median, quartiles, how many times it was done."""

    median: float
    low: float
    high: float
    samples: int


class Conditions(TypedDict):
    """Under which something was timed; ``load`` is how many processes wanted a core over the last
    minute, this one's own threads among them (None where the system does not tell)."""

    device: str
    threads: int
    cores: int
    load: float | None


class Limits(TypedDict):
    """What the device does at best, as measured: a roof for everything else.

    ``reader`` names the operation that read fastest; ``flops_per_second`` is by dtype.
    """

    bytes_per_second: float
    reader: str
    flops_per_second: dict[str, float]
    seconds: dict[str, Spread]


class Fit(TypedDict):
    """t = t0 + b T + a P: T unique experts, P token-expert pairs (DES, Eq. 2)."""

    t0: float  # seconds
    b: float  # seconds an expert
    a: float  # seconds a pair
    r2: float
    error: float  # median of |predicted - measured| / measured


def spread(samples: Sequence[float]) -> Spread:
    """Raises ValueError where there are none."""
    if not samples:
        raise ValueError("no samples to take the median of")
    low, high = samples[0], samples[0]
    if len(samples) > 1:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median=statistics.median(samples), low=low, high=high, samples=len(samples))


def mean_spread(spreads: Sequence[Spread]) -> Spread:
    """Of several works' medians and quartiles: what a mean work takes."""
    return Spread(
        median=statistics.fmean(each["median"] for each in spreads),
        low=statistics.fmean(each["low"] for each in spreads),
        high=statistics.fmean(each["high"] for each in spreads),
        samples=sum(each["samples"] for each in spreads),
    )


def in_turns(
    works: Mapping[Key, Work],
    rounds: int,
    *,
    device: torch.device,
    tell: Callable[[float], None] = lambda share: None,
) -> dict[Key, Spread]:
    """Does every work once a round, in an order drawn anew each time: what slows the machine for a
    while slows them all. One round before the first is not kept.
    """
    draw = random.Random(0)
    order = list(works)
    taken: dict[Key, list[float]] = {key: [] for key in order}
    with torch.inference_mode():
        for number in range(rounds + 1):
            draw.shuffle(order)
            for key in order:
                seconds = once(works[key], device)
                if number:
                    taken[key].append(seconds)
            tell((number + 1) / (rounds + 1))
    return {key: spread(samples) for key, samples in taken.items()}


def once(work: Work, device: torch.device) -> float:
    """Seconds until the device is done with it."""
    settle(device)
    began = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - began


def settle(device: torch.device) -> None:
    """Wait for a device that works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def limits(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    pace: Pace = FULL,
) -> Limits:
    """Read much memory with whatever torch reads fastest; multiply square matrices."""
    square = pace.square
    much = torch.ones(pace.read // 4, device=device)
    rows = much.view(-1, min(4096, len(much)))
    readers: dict[str, Work] = {
        "sum": much.sum,
        "dot": lambda: torch.dot(much, much),
        "matrix times vector": lambda: rows @ rows[0],
    }
    factors = {
        name(dtype): torch.ones(square, square, dtype=dtype, device=device) for dtype in dtypes
    }
    products: dict[str, Work] = {said: (lambda a=a: a @ a) for said, a in factors.items()}
    taken = in_turns(readers | products, pace.rounds or PROBES, device=device)
    reader = min(readers, key=lambda said: taken[said]["median"])
    return Limits(
        bytes_per_second=much.nbytes / taken[reader]["median"],
        reader=reader,
        flops_per_second={said: 2 * square**3 / taken[said]["median"] for said in products},
        seconds=taken,
    )


def conditions(device: torch.device) -> Conditions:
    """Of the minute that has passed: ask at the end of the work."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        load = None
    cores = os.cpu_count() or 1
    return Conditions(device=device.type, threads=torch.get_num_threads(), cores=cores, load=load)


def on(there: Conditions) -> str:
    """As in "cpu, 2 threads"."""
    return f"{there['device']}, {counted(there['threads'], 'thread')}"


def crowded(there: Conditions) -> list[str]:
    """A sentence for whoever reads the times, where others worked on the machine as well."""
    load = there["load"]
    if load is None or load <= max(there["cores"], there["threads"]) + 0.5:
        return []
    return [
        f"The machine was not quiet: {load:.1f} processes wanted its "
        f"{counted(there['cores'], 'core')} while these times were taken, so they are too long."
    ]


def name(dtype: torch.dtype) -> str:
    """As in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def fit(experts: Sequence[float], pairs: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Least squares over measured layers; raises ValueError where t0, b, a cannot be told apart."""
    measured = np.array(seconds, dtype=np.float64)
    terms = np.stack([np.ones_like(measured), np.array(experts), np.array(pairs)], axis=1)
    scale = np.abs(terms).max(axis=0)
    found, _, rank, _ = np.linalg.lstsq(terms / scale, measured, rcond=1e-9)
    if rank < 3:
        raise ValueError("experts and pairs must vary, each for itself, to fit what each costs")
    t0, b, a = (float(value) for value in found / scale)
    misses = terms @ np.array([t0, b, a]) - measured
    around = float(((measured - measured.mean()) ** 2).sum())
    return Fit(
        t0=t0,
        b=b,
        a=a,
        r2=1 - float((misses**2).sum()) / around if around else 1.0,
        error=float(np.median(np.abs(misses) / measured)),
    )


def predicted(line: Fit, experts: float, pairs: float) -> float:
    """Seconds (DES, Eq. 2)."""
    return line["t0"] + line["b"] * experts + line["a"] * pairs


def counted(count: int, noun: str) -> str:
    """As in "1 thread", "2 threads"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
