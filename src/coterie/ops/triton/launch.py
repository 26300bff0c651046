"""Launching kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def launch(
    kernel: Callable[..., object],
    grid: tuple[int, ...],
    *args: Tensor | int | None,
    **constants: int | float | str,
) -> None:
    """Queues ``kernel`` on the device of its tensors and returns immediately."""
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):  # Triton launches on the current device
            kernel[grid](*args, **constants)  # pyright: ignore[reportIndexIssue]
    else:
        kernel[grid](*args, **constants)  # pyright: ignore[reportIndexIssue]


def ceil_div(total: int, size: int) -> int:
    """total / size, rounded up."""
    return -(-total // size)


def next_power_of_two(minimum: int) -> int:
    """The smallest power of two that is not less than ``minimum``; 1 for 0."""
    return 1 << max(0, minimum - 1).bit_length()
