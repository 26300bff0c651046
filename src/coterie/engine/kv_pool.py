"""Allocation of KV cache rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coterie.model.cache import KVCache
from coterie.model.spec import ModelSpec

SPARE_POSITIONS = 256  # a cache grows in multiples of this
IDLE_BYTES = 256 << 20  # a larger cache on a CPU is freed when no request is active


class KVCachePool:
    """One KV cache for all requests; it is copied into a larger one if rows or positions run out.

    On a GPU the cache is kept between requests, since captured CUDA graphs hold its addresses. On
    a CPU only a small one is.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self._spec, self._dtype, self._device = spec, dtype, device
        self._cache: KVCache | None = None
        self._free_rows: list[int] = []
        self._num_rows = 0
        self._reserved = 1
        self._written: set[int] = set()  # rows of earlier requests, to be cleared

    def reserve(self, rows: int) -> None:
        """The next growth makes room for so many rows, which saves copies of a growing cache."""
        self._reserved = rows

    def allocate(self, length: int, prefix: Sequence[KVCache] = ()) -> int:
        """The index of a row with at least ``length`` positions, empty after the keys of
        ``prefix``."""
        old = self._cache
        if old is None or not self._free_rows or old.length < length:
            self._grow(length)
        row = self._free_rows.pop(0)
        if row in self._written:
            self.full_cache().clear([row])
        self._written.add(row)
        start = 0
        for span in prefix:
            self.full_cache().paste(row, start, span)
            start += span.length
        return row

    def free(self, row: int) -> None:
        self._free_rows = sorted((*self._free_rows, row))
        is_idle = len(self._free_rows) == self._num_rows
        if is_idle and self._device.type == "cpu" and self.full_cache().nbytes > IDLE_BYTES:
            self._cache, self._free_rows, self._num_rows = None, [], 0
            self._written.clear()

    def rows(self, indices: Sequence[int]) -> KVCache:
        return self.full_cache().select_rows(indices)

    def full_cache(self) -> KVCache:
        """The cache of all rows, allocated or free."""
        if self._cache is None:
            raise RuntimeError("no row is allocated")
        return self._cache

    def _grow(self, length: int) -> None:
        old = self._cache
        count = self._num_rows if self._free_rows else 2 * self._num_rows
        count = max(count, self._reserved)
        length = max(length, old.length if old else 0)
        length = -(-length // SPARE_POSITIONS) * SPARE_POSITIONS
        new = KVCache.allocate(self._spec, count, length, dtype=self._dtype, device=self._device)
        if old is not None:
            for before, after in zip(old.keys + old.values, new.keys + new.values, strict=True):
                after[: self._num_rows, :, : old.length] = before
        self._free_rows += range(self._num_rows, count)
        self._cache, self._num_rows = new, count
