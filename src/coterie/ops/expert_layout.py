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

from coterie.quantization import QTensor, QuantFormat
from coterie.values import Slab

ALIGNMENT = 256  # bytes; what a GPU's widest accesses like addresses to be multiples of
WEIGHT_NAMES = ("gate_up", "down")


@dataclass(frozen=True)
class TensorSpan:
    """One tensor [rows, columns] of every expert, from byte ``start`` of it on."""

    start: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        rows, columns = self.shape
        return self.start + rows * columns * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """[n, rows, columns] of memory [n, bytes of an expert] uint8, over the same bytes."""
        return memory[:, self.start : self.stop].view(self.dtype).unflatten(1, self.shape)


@dataclass(frozen=True)
class ExpertLayout:
    """The bytes of an expert: floats of a dtype, or whole numbers of a format and their scales."""

    hidden: int
    width: int
    element_type: torch.dtype | QuantFormat

    @cached_property
    def spans(self) -> Mapping[str, TensorSpan]:
        """By name: ``gate_up`` and ``down``, or ``.q`` and ``.scales`` of these."""
        spans: dict[str, TensorSpan] = {}
        start = 0
        for name, shape, dtype in self._tensors():
            span = spans[name] = TensorSpan(start, shape, dtype)
            start = _align_up(span.stop)
        return spans

    @property
    def size(self) -> int:
        """Bytes from one expert to the next."""
        return _align_up(max(span.stop for span in self.spans.values()))

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Of memory [n, size] uint8, each part by name."""
        return {name: span.view(memory) for name, span in self.spans.items()}

    def as_slab(self, memory: Tensor, slot_of: Tensor) -> Slab:
        """A slab over memory [n, size] uint8; it copies nothing."""
        tensors = self.views(memory)
        if not isinstance(self.element_type, QuantFormat):
            return Slab(tensors["gate_up"], tensors["down"], slot_of)
        gate_up, down = (
            QTensor(tensors[f"{name}.q"], tensors[f"{name}.scales"], self.element_type, k)
            for name, k in zip(WEIGHT_NAMES, (self.hidden, self.width), strict=True)
        )
        return Slab(gate_up, down, slot_of)

    def fill(self, memory: Tensor, slab: Slab) -> None:
        """Write the experts of a slab, slot by slot, into memory [n, size] uint8."""
        target = self.as_slab(memory, slab.slot_of)
        for destination, weight in ((target.gate_up, slab.gate_up), (target.down, slab.down)):
            if isinstance(destination, QTensor) and isinstance(weight, QTensor):
                destination.q.copy_(weight.q)
                destination.scales.copy_(weight.scales)
            elif isinstance(destination, Tensor) and isinstance(weight, Tensor):
                destination.copy_(weight)
            else:
                raise ValueError(f"experts in {weight.dtype} are none in {self.element_type}")

    def _tensors(self) -> Iterator[tuple[str, tuple[int, int], torch.dtype]]:
        shapes = ((2 * self.width, self.hidden), (self.hidden, self.width))
        if not isinstance(self.element_type, QuantFormat):
            yield from (
                (name, shape, self.element_type)
                for name, shape in zip(WEIGHT_NAMES, shapes, strict=True)
            )
            return
        stored_shapes = [self.element_type.storage_shapes(shape) for shape in shapes]
        for name, (numbers, _) in zip(WEIGHT_NAMES, stored_shapes, strict=True):
            yield f"{name}.q", (numbers[0], numbers[1]), self.element_type.dtype
        for name, (_, scales) in zip(WEIGHT_NAMES, stored_shapes, strict=True):
            yield f"{name}.scales", (scales[0], scales[1]), torch.bfloat16


def _align_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
