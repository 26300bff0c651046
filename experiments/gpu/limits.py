"""The device's limits: copy bandwidth and the rate of a large product."""

from __future__ import annotations

import torch

from experiments.gpu.report import PartReport
from experiments.gpu.timing import time_replays

COPY_BYTES = 4 << 30  # several times any cache
SIDE = 8192


def measure(device: torch.device, report: PartReport, *, dry: bool = False) -> None:
    bandwidth = copy_bandwidth(device, report, dry=dry)
    side = 64 if dry else SIDE
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    micros = report.add_times("large product in bf16", time_replays(lambda: a @ b, device))
    report.add_figure("copy bandwidth, GB/s", bandwidth / 1e9)
    report.add_figure("bf16 product, TFLOP/s", 2 * side**3 / micros / 1e6)


def copy_bandwidth(device: torch.device, report: PartReport, *, dry: bool = False) -> float:
    """Bytes per second, read plus written; of random bytes, since zeros may be faster."""
    size = (1 << 20 if dry else COPY_BYTES) // 2
    source = torch.randint(-(1 << 62), 1 << 62, (size // 8,), device=device)
    target = torch.empty_like(source)
    micros = report.add_times("copy", time_replays(lambda: target.copy_(source), device))
    report.facts["copy bandwidth"] = rate = 2 * source.nbytes / micros * 1e6
    return rate
