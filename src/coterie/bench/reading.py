"""Reading the bytes of weights and doing nothing else: what the memory allows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from coterie.ops import cpu
from coterie.quant import QTensor
from coterie.values import PackedMatrix, Panels, Slab

Weight = Tensor | QTensor | Panels | PackedMatrix


def memory_of(weights: Iterable[Weight]) -> list[Tensor]:
    """Their memory, each once: a slab's panels share theirs. Tensors of any shape and type."""
    found: dict[int, Tensor] = {}
    for weight in weights:
        if isinstance(weight, QTensor):
            parts = [weight.q, weight.scales]
        else:
            parts = [weight.packed if isinstance(weight, Panels | PackedMatrix) else weight]
        found |= {part.data_ptr(): part for part in parts}
    return list(found.values())


def rows_of(memory: Iterable[Tensor]) -> list[Slab | Tensor]:
    """The same as ``read_rows`` takes it, so that no reading pays for that: each [n, ..]."""
    fast = cpu.ready()
    return [_as_slab(each) if fast and each.device.type == "cpu" else each for each in memory]


def read_rows(rows: Iterable[Slab | Tensor], used: Tensor) -> None:
    """Read the rows ``used`` (bool [n]) of each."""
    for each in rows:
        if isinstance(each, Slab):
            cpu.read(each, used)
        else:
            for row in used.nonzero().flatten().tolist():
                each[row].sum()


def _as_slab(rows: Tensor) -> Slab:
    """As the kernels' probe takes memory; nothing is computed with it."""
    rows = rows.view(torch.uint8).flatten(1)
    panels = Panels(rows, "bf16", (len(rows), 0, 0))
    return Slab(panels, panels, torch.arange(len(rows)))
