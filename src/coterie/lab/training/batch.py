"""The batch of a training step. Shapes: B rows, L positions, n = L / block blocks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

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
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        chunks = {name: v.split(rows) for name, v in values.items() if isinstance(v, Tensor)}
        return [
            replace(
                self, **{name: chunk[part] for name, chunk in chunks.items()}, loss_divisor=divisor
            )
            for part in range(parts)
        ]
