"""Keys and values by position. A later write wins, so the cache has no modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.model.spec import ModelSpec
from coterie.values import LayerKV, Window


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each [rows, kv_heads, length, head_dim].

    ``chosen`` ([B] int64) makes this a view of some rows; reading through it copies them, writing
    lands in the rows themselves. Memory starts at zero: a position nobody wrote is hidden by the
    window, and zero times hidden is zero where NaN would not be.
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
        """An empty cache of so many rows, each with ``length`` positions."""
        shape = (rows, spec.kv_heads, length, spec.head_dim)
        keys = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers))
        values = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.layers))
        return KVCache(keys, values)

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]

    def select_rows(self, indices: Sequence[int]) -> KVCache:
        """These rows in this order: without a copy where they are neighbours."""
        if self.row_indices is not None:
            raise ValueError("rows() of a gathered view: take them from the whole cache")
        first = indices[0]
        if list(indices) == list(range(first, first + len(indices))):
            span = slice(first, first + len(indices))
            return KVCache(tuple(k[span] for k in self.keys), tuple(v[span] for v in self.values))
        return KVCache(
            self.keys, self.values, torch.tensor(list(indices), device=self.keys[0].device)
        )

    def layer_kv(self, layer: int, rows: int) -> LayerKV:
        """The layer's keys and values, to be written and read in place for so many rows."""
        return LayerKV(self.keys[layer], self.values[layer], self._cache_rows(rows))

    def write(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key and value [B, W, kv_heads, head_dim] at positions [B, W]."""
        rows = self._cache_rows(len(positions))[:, None]
        self.keys[layer][rows, :, positions] = key
        self.values[layer][rows, :, positions] = value

    def read(self, layer: int, kv_length: int) -> tuple[Tensor, Tensor]:
        """Keys and values before position ``reach``, each [B, kv_heads, reach, head_dim]."""
        keys, values = self.keys[layer], self.values[layer]
        if self.row_indices is not None:
            keys, values = keys[self.row_indices], values[self.row_indices]
        return keys[:, :, :kv_length], values[:, :, :kv_length]

    def clear(self, indices: Sequence[int]) -> None:
        """Forget these rows, so that a new request starts as in a fresh cache."""
        for tensor in (*self.keys, *self.values):
            tensor[list(indices)] = 0

    def _cache_rows(self, rows: int) -> Tensor:
        """[rows] int64: which of the cache's rows they are."""
        if self.row_indices is not None:
            return self.row_indices
        return torch.arange(rows, device=self.keys[0].device)


def window_positions(window: Window, device: torch.device | str) -> Tensor:
    """Absolute position of everything the window computes, [B, W]."""
    start = window.start.to(device, non_blocking=True)
    return start[:, None] + torch.arange(window.width, device=device)
