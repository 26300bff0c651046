"""The one place that starts kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def launch(
    kernel: Callable[..., object], grid: tuple[int, ...], *args: Tensor | int | None, **sizes: int
) -> None:
    """Queues ``kernel`` on the device of its tensors; waits for nothing."""
    kernel[grid](*args, **sizes)  # pyright: ignore[reportIndexIssue]
