"""Bandwidth probe: reads the bytes of weights and computes nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from coterie.ops import cpu
from coterie.quantization import QTensor
from coterie.values import PackedExperts, PackedMatrix, Slab

AnyWeight = Tensor | QTensor | PackedExperts | PackedMatrix


def weight_buffers(weights: Iterable[AnyWeight]) -> list[Tensor]:
    """The distinct buffers of weights; the packed matrices of a slab share one."""
    buffers: dict[int, Tensor] = {}
    for weight in weights:
        if isinstance(weight, QTensor):
            parts = [weight.q, weight.scales]
        else:
            parts = [weight.packed if isinstance(weight, PackedExperts | PackedMatrix) else weight]
        buffers |= {part.data_ptr(): part for part in parts}
    return list(buffers.values())


def readable_rows(buffers: Iterable[Tensor]) -> list[Slab | Tensor]:
    """Buffers [n, ...] in the form that ``read_rows`` takes."""
    use_kernel = cpu.is_available()
    return [
        _as_slab(buffer) if use_kernel and buffer.device.type == "cpu" else buffer
        for buffer in buffers
    ]


def read_rows(rows: Iterable[Slab | Tensor], used: Tensor) -> None:
    """Reads the rows ``used`` (bool [n]) of each buffer."""
    for matrix in rows:
        if isinstance(matrix, Slab):
            cpu.read_experts(matrix, used)
        else:
            for row in used.nonzero().flatten().tolist():
                matrix[row].sum()


def _as_slab(rows: Tensor) -> Slab:
    """A buffer in the form of the kernels' read probe."""
    rows = rows.view(torch.uint8).flatten(1)
    panels = PackedExperts(rows, "bf16", (len(rows), 0, 0))
    return Slab(panels, panels, torch.arange(len(rows)))
