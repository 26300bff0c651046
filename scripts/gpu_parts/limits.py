"""What the device does at best, measured beside everything that is held against it."""

from __future__ import annotations

import torch
from gpu_parts.clock import replayed
from gpu_parts.found import Figure, Found

COPIED = 4 << 30  # bytes; several times any cache
SQUARE = 8192


def measure(device: torch.device, *, dry: bool = False, found: Found | None = None) -> Found:
    """Copy bandwidth, and the rate of a large product in bf16."""
    found = found or Found()
    bandwidth = copy_bandwidth(device, found, dry=dry)
    side = 64 if dry else SQUARE
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    taken = found.took("large product in bf16", replayed(lambda: a @ b, device))
    found.judge(Figure("copy bandwidth, GB/s", bandwidth / 1e9))
    found.judge(Figure("bf16 product, TFLOP/s", 2 * side**3 / taken / 1e6))
    return found


def copy_bandwidth(device: torch.device, found: Found, *, dry: bool = False) -> float:
    """Bytes a second, read and written together; random bytes, for zeros may be faster."""
    size = (1 << 20 if dry else COPIED) // 2
    source = torch.randint(-(1 << 62), 1 << 62, (size // 8,), device=device)
    target = torch.empty_like(source)
    taken = found.took("copy", replayed(lambda: target.copy_(source), device))
    return 2 * source.nbytes / taken * 1e6
