"""How work on a GPU is timed; without one it is done once, and times mean nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]
WARM = 3
SAMPLES = 25
TOGETHER = 20  # calls that one sample spans: a call alone is shorter than a clock's tick


def replayed(work: Work, device: torch.device) -> list[float]:
    """Microseconds a call takes the device when nobody has to launch it: replays of a graph."""
    if device.type != "cuda":
        return launched(work, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(TOGETHER):
            work()
    return _sampled(graph.replay, TOGETHER)


def launched(work: Work, device: torch.device) -> list[float]:
    """Microseconds a call takes when the host launches it, gaps and all."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return [(time.perf_counter() - began) * 1e6]
    for _ in range(WARM):
        work()

    def many() -> None:
        for _ in range(TOGETHER):
            work()

    return _sampled(many, TOGETHER)


def kernels(work: Work, device: torch.device) -> list[str]:
    """The names of what one call runs on the device, in order; copies and fills too."""
    if device.type != "cuda":
        return []
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    found = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in sorted(found, key=lambda event: event.time_range.start)]


def _sampled(work: Work, calls: int) -> list[float]:
    work()
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(SAMPLES)
    ]
    torch.cuda.synchronize()
    for first, last in marks:
        first.record()
        work()
        last.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) * 1000 / calls for first, last in marks]
