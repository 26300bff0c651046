"""The batch of a training step. Shapes: B rows, L positions, n = L / block blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """Noised rows and their targets."""

    tokens: Tensor  # [B, L] int64, masked inputs
    positions: Tensor  # [B, L] int64, from the start of the problem
    block_mask: Tensor  # [B, n, n] bool: query block sees key block
    targets: Tensor  # [B, L] int64; -100: no loss
    weights: Tensor  # [B, L] float32, of each target's loss
    tasks: Tensor | None = None  # [B, L] int64, for the log only
    loss_divisor: float = 0.0  # 0: the sum of the batch's weights

    def total_weight(self) -> float:
        """The divisor of the loss: the sum of weights over target positions."""
        return self.loss_divisor or float(self.weights[self.targets >= 0].sum())

    def split(self, parts: int) -> list[TrainingBatch]:
        """Equal parts with the divisor of the whole batch, so that their gradients add up."""
        if len(self.tokens) % parts:
            raise ValueError(f"{len(self.tokens)} rows do not split into {parts} equal parts")
        rows, divisor = len(self.tokens) // parts, self.total_weight()
        return [self._slice_rows(slice(i * rows, (i + 1) * rows), divisor) for i in range(parts)]

    def to_arrays(self) -> tuple[np.ndarray | float | None, ...]:
        """The fields as plain arrays, for a queue between processes."""
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(v.numpy() if isinstance(v, Tensor) else v for v in values)

    @staticmethod
    def from_arrays(arrays: tuple[np.ndarray | float | None, ...]) -> TrainingBatch:
        """The inverse of ``to_arrays``."""
        values = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in arrays]
        return TrainingBatch(*values)  # pyright: ignore[reportArgumentType]

    def _slice_rows(self, rows: slice, divisor: float) -> TrainingBatch:
        tasks = None if self.tasks is None else self.tasks[rows]
        return replace(
            self,
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            block_mask=self.block_mask[rows],
            targets=self.targets[rows],
            weights=self.weights[rows],
            tasks=tasks,
            loss_divisor=divisor,
        )
