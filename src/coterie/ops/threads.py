"""As many threads as a work keeps busy: waking one takes as long as a small operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MIN_SHARE = 1 << 22
"""Multiplications of one thread that take longer than waking it."""


def busy_threads(multiplications: int) -> int:
    """As many of torch's threads as one parallel region of so many multiplications keeps busy."""
    return min(torch.get_num_threads(), max(1, multiplications // MIN_SHARE))


@contextmanager
def limited_threads(multiplications: int, *, regions: int) -> Iterator[None]:
    """Torch, too, takes only as many threads as the work of so many parallel regions keeps busy."""
    before = torch.get_num_threads()
    threads = busy_threads(multiplications // regions)
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
