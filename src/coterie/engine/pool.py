"""Cache rows, taken and given back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coterie.model.cache import Cache
from coterie.model.spec import ModelSpec

SPARE = 256  # positions by which a GPU's cache grows


class Pool:
    """One cache for all rows of an engine; it grows, by copying, when rows or positions run out.

    On a GPU it stays for the next request, with some positions to spare: forwards kept there know
    its addresses.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._spec, self._dtype, self._device = spec, dtype, device
        self._cache: Cache | None = None
        self._free: list[int] = []
        self._count = 0

    def take(self, length: int) -> int:
        """A cleared row with at least ``length`` positions."""
        if self._cache is None or not self._free or self._cache.length < length:
            self._grow(length)
        row = self._free.pop(0)
        if self._cache is not None:
            self._cache.clear([row])
        return row

    def give(self, row: int) -> None:
        self._free = sorted((*self._free, row))
        if (
            self._device.type == "cpu" and len(self._free) == self._count
        ):  # nobody is left: the next request sets the size
            self._cache, self._free, self._count = None, [], 0

    def rows(self, indices: Sequence[int]) -> Cache:
        return self.whole().rows(indices)

    def whole(self) -> Cache:
        """All rows, taken or not."""
        if self._cache is None:
            raise RuntimeError("no row was taken")
        return self._cache

    def _grow(self, length: int) -> None:
        old = self._cache
        count = self._count if self._free else max(1, 2 * self._count)
        length = max(length, old.length if old else 0)
        if self._device.type != "cpu":
            length = -(-length // SPARE) * SPARE
        new = Cache.allocate(self._spec, count, length, dtype=self._dtype, device=self._device)
        if old is not None:
            for before, after in zip(old.keys + old.values, new.keys + new.values, strict=True):
                after[: self._count, :, : old.length] = before
        self._free += range(self._count, count)
        self._cache, self._count = new, count
