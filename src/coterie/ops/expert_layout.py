"""The expert layout for GPUs: all tensors of an expert in one contiguous run of bytes.

Gate-up, down, then the scales of both if quantised. Each tensor, and each expert, starts at a
multiple of 256 bytes. One copy moves a whole expert, and a slab over such memory consists of
strided views that the kernels read in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from coterie.quantization import QTensor, QuantFormat
from coterie.values import Slab

ALIGNMENT = 256  # bytes; alignment of the widest GPU memory accesses


@dataclass(frozen=True)
class TensorSpan:
    """One tensor [rows, columns] of an expert, at byte ``start`` of the expert."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape) * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """A view [n, rows, columns] of this tensor in memory [n, expert bytes] uint8."""
        return memory[:, self.start : self.stop].view(self.dtype).unflatten(1, self.shape)


@dataclass(frozen=True)
class ExpertLayout:
    """The byte layout of one expert, in a float dtype or a quantised format with scales."""

    hidden: int
    width: int
    element_type: torch.dtype | QuantFormat

    @cached_property
    def spans(self) -> Mapping[str, TensorSpan]:
        """The tensors by name: ``gate_up`` and ``down``, or ``.q`` and ``.scales`` of both."""
        spans: dict[str, TensorSpan] = {}
        start = 0
        for name, (shape, dtype) in self._tensors().items():
            span = spans[name] = TensorSpan(start, shape, dtype)
            start = _align_up(span.stop)
        return spans

    @property
    def size(self) -> int:
        """Bytes of one expert, aligned."""
        return _align_up(max(span.stop for span in self.spans.values()))

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Views of memory [n, size] uint8, by tensor name."""
        return {name: span.view(memory) for name, span in self.spans.items()}

    def as_slab(self, memory: Tensor, slot_of: Tensor) -> Slab:
        """A slab over memory [n, size] uint8; it copies nothing."""
        form = self.element_type if isinstance(self.element_type, QuantFormat) else None
        return Slab.of(self.views(memory), form, slot_of)

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
                raise ValueError(
                    f"experts in {weight.dtype} do not fit a layout of {self.element_type}"
                )

    def _tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes = {"gate_up": (2 * self.width, self.hidden), "down": (self.hidden, self.width)}
        form = self.element_type
        if not isinstance(form, QuantFormat):
            return {name: (shape, form) for name, shape in shapes.items()}
        return {
            f"{name}.{part}": form.parts(shape)[part]
            for part in ("q", "scales")
            for name, shape in shapes.items()
        }


def _align_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
