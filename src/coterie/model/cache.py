"""The KV cache, indexed by position. A later write to a position replaces an earlier one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.model.spec import ModelSpec
from coterie.ops.threads import limited_threads
from coterie.values import LayerKV, Window


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each [rows, kv_heads, length, head_dim].

    ``row_indices`` ([B] int64) makes this a view of some rows: reads copy them, writes change the
    cache itself. Memory starts at zero: the mask gives unwritten positions weight zero, and zero
    times NaN would be NaN.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    row_indices: Tensor | None = None

    @staticmethod
    def allocate(
        spec: ModelSpec,
        rows: int,
        length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """An empty cache of ``rows`` rows with ``length`` positions each."""
        shapes = [(rows, kind.kv_heads, length, kind.head_dim) for kind in spec.attention]
        with limited_threads(2 * sum(map(math.prod, shapes)), regions=1):
            memory = [torch.zeros(s, dtype=dtype, device=device) for s in shapes for _ in range(2)]
        return KVCache(tuple(memory[::2]), tuple(memory[1::2]))

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.keys + self.values)

    def select_rows(self, indices: Sequence[int]) -> KVCache:
        """A view of these rows in this order; consecutive rows are a slice."""
        if self.row_indices is not None:
            raise ValueError("cannot select rows of a view; select from the whole cache")
        first = indices[0]
        if list(indices) == list(range(first, first + len(indices))):
            span = slice(first, first + len(indices))
            return KVCache(tuple(k[span] for k in self.keys), tuple(v[span] for v in self.values))
        return KVCache(
            self.keys, self.values, torch.tensor(list(indices), device=self.keys[0].device)
        )

    def layer_kv(self, layer: int, rows: int) -> LayerKV:
        """The layer's keys and values for ``rows`` rows, to be read and written in place."""
        return LayerKV(self.keys[layer], self.values[layer], self._cache_rows(rows))

    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [B, W, kv_heads, head_dim] at positions [B, W]."""
        rows = self._cache_rows(len(positions))[:, None]
        self.keys[layer][rows, :, positions] = key
        self.values[layer][rows, :, positions] = value

    def read(self, layer: int, kv_length: int) -> tuple[Tensor, Tensor]:
        """Keys and values before ``kv_length``, each [B, kv_heads, kv_length, head_dim]."""
        keys, values = (t[layer][:, :, :kv_length] for t in (self.keys, self.values))
        if self.row_indices is None:
            return keys, values
        return keys[self.row_indices], values[self.row_indices]

    def copy_span(self, row: int, start: int, stop: int) -> KVCache:
        """A copy of these positions of one row, as a cache of one row."""
        keys, values = (
            tuple(tensor[row : row + 1, :, start:stop].clone() for tensor in tensors)
            for tensors in (self.keys, self.values)
        )
        return KVCache(keys, values)

    def paste(self, row: int, start: int, span: KVCache) -> None:
        """Write a copy of a row's positions to a row, from position ``start`` on."""
        tensors = zip((*self.keys, *self.values), (*span.keys, *span.values), strict=True)
        for tensor, copied in tensors:
            tensor[row, :, start : start + span.length] = copied[0]

    def row_bytes(self, length: int) -> int:
        """The size of ``length`` positions of one row."""
        return sum(tensor[0, :, :length].nbytes for tensor in (*self.keys, *self.values))

    def clear(self, indices: Sequence[int]) -> None:
        """Zeroes these rows, so that a new request starts as in an empty cache."""
        tensors = (*self.keys, *self.values)
        elements = len(tensors) * len(indices) * self.keys[0][0].numel()
        with limited_threads(elements, regions=1):
            for tensor in tensors:
                tensor[list(indices)] = 0

    def _cache_rows(self, rows: int) -> Tensor:
        """[rows] int64: the rows of the underlying tensors."""
        if self.row_indices is not None:
            return self.row_indices
        return torch.arange(rows, device=self.keys[0].device)


def window_positions(window: Window, device: torch.device | str) -> Tensor:
    """Absolute positions of the window's tokens, [B, W]."""
    if window.positions is not None:
        return window.positions.to(device, non_blocking=True)
    start = window.start.to(device, non_blocking=True)
    return start[:, None] + torch.arange(window.width, device=device)
