"""The one place that starts kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def launch(
    kernel: Callable[..., object],
    grid: tuple[int, ...],
    *args: Tensor | int | None,
    **constants: int | float | str,
) -> None:
    """Queues ``kernel`` on the device of its tensors; waits for nothing."""
    kernel[grid](*args, **constants)  # pyright: ignore[reportIndexIssue]
