"""An expert as one run of bytes that a GPU's kernels read where it lies: rows stay rows.

First gate and up, then down, then the scales of both where there are any; each begins at a
multiple of 256 bytes, as the expert itself does. One copy brings it all, and a slab over such
memory is views whose experts are further apart than their weights are long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from coterie.quant import Format, QTensor
from coterie.values import Slab

LINE = 256  # bytes; what a GPU's widest accesses like addresses to be multiples of
WEIGHTS = ("gate_up", "down")


@dataclass(frozen=True)
class Part:
    """One tensor [rows, columns] of every expert, from byte ``start`` of it on."""

    start: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        rows, columns = self.shape
        return self.start + rows * columns * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """[n, rows, columns] of memory [n, bytes of an expert] uint8, over the same bytes."""
        return memory[:, self.start : self.stop].view(self.dtype).unflatten(1, self.shape)


@dataclass(frozen=True)
class Layout:
    """The bytes of an expert: floats of a dtype, or whole numbers of a format and their scales."""

    hidden: int
    width: int
    kept: torch.dtype | Format

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """By name: ``gate_up`` and ``down``, or ``.q`` and ``.scales`` of these."""
        found: dict[str, Part] = {}
        start = 0
        for name, shape, dtype in self._tensors():
            part = found[name] = Part(start, shape, dtype)
            start = _whole_lines(part.stop)
        return found

    @property
    def size(self) -> int:
        """Bytes from one expert to the next."""
        return _whole_lines(max(part.stop for part in self.parts.values()))

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Of memory [n, size] uint8, each part by name."""
        return {name: part.of(memory) for name, part in self.parts.items()}

    def shown(self, memory: Tensor, slot_of: Tensor) -> Slab:
        """A slab over memory [n, size] uint8; it copies nothing."""
        parts = self.views(memory)
        if not isinstance(self.kept, Format):
            return Slab(parts["gate_up"], parts["down"], slot_of)
        gate_up, down = (
            QTensor(parts[f"{name}.q"], parts[f"{name}.scales"], self.kept, k)
            for name, k in zip(WEIGHTS, (self.hidden, self.width), strict=True)
        )
        return Slab(gate_up, down, slot_of)

    def fill(self, memory: Tensor, slab: Slab) -> None:
        """Write the experts of a slab, slot by slot, into memory [n, size] uint8."""
        mine = self.shown(memory, slab.slot_of)
        for to, weight in ((mine.gate_up, slab.gate_up), (mine.down, slab.down)):
            if isinstance(to, QTensor) and isinstance(weight, QTensor):
                to.q.copy_(weight.q)
                to.scales.copy_(weight.scales)
            elif isinstance(to, Tensor) and isinstance(weight, Tensor):
                to.copy_(weight)
            else:
                raise ValueError(f"experts in {weight.dtype} are none in {self.kept}")

    def _tensors(self) -> Iterator[tuple[str, tuple[int, int], torch.dtype]]:
        shapes = ((2 * self.width, self.hidden), (self.hidden, self.width))
        if not isinstance(self.kept, Format):
            yield from (
                (name, shape, self.kept) for name, shape in zip(WEIGHTS, shapes, strict=True)
            )
            return
        held = [self.kept.stored(shape) for shape in shapes]
        for name, (numbers, _) in zip(WEIGHTS, held, strict=True):
            yield f"{name}.q", (numbers[0], numbers[1]), self.kept.dtype
        for name, (_, scales) in zip(WEIGHTS, held, strict=True):
            yield f"{name}.scales", (scales[0], scales[1]), torch.bfloat16


def _whole_lines(size: int) -> int:
    return -(-size // LINE) * LINE
