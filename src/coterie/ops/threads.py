"""One thread for small work, else all: waking one takes as long as a small operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MIN_SHARE = 1 << 22
"""Multiplications of one thread that take longer than waking it."""


def busy_threads(multiplications: int) -> int:
    """All of torch's threads if a parallel region keeps two of them busy, else one.

    No number between these: OpenMP ends the threads that a region does not use, and makes them
    again for the next one.
    """
    return torch.get_num_threads() if multiplications >= 2 * MIN_SHARE else 1


@contextmanager
def limited_threads(multiplications: int, *, regions: int) -> Iterator[None]:
    """Torch, too, takes as many threads as ``busy_threads`` of a work in so many regions."""
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
