"""Times work on a GPU; on a CPU it runs once, and the times mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]
WARMUP = 3
SAMPLES = 25
CALLS = 20  # in one sample: one call is shorter than the clock's resolution


def time_replays(work: Work, device: torch.device) -> list[float]:
    """Microseconds of the device for a call, without launches: replays of a CUDA graph."""
    if device.type != "cuda":
        return time_launches(work, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    return time_events(graph.replay, samples=SAMPLES, calls=CALLS)


def time_launches(work: Work, device: torch.device, calls: int = CALLS) -> list[float]:
    """Microseconds of a call that the host launches, gaps included."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return [(time.perf_counter() - start) * 1e6]
    for _ in range(WARMUP):
        work()
    return time_events(lambda: [work() for _ in range(calls)], samples=SAMPLES, calls=calls)


def time_events(work: Work, *, samples: int, calls: int = 1) -> list[float]:
    """Microseconds of each of ``calls`` calls that ``work`` makes, between two CUDA events."""
    work()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    torch.cuda.synchronize()
    for first, last in pairs:
        first.record()
        work()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) * 1e3 / calls for first, last in pairs]


def kernel_names(work: Work, device: torch.device) -> list[str]:
    """The kernels, copies and fills of one call on the device, in order."""
    if device.type != "cuda":
        return []
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
