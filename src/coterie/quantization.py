"""Weights in 8 or 4 bits: integers in groups along k, with one bf16 scale for each group.

A weight is ``q * scale``, with q in -8 .. 7 (int4) or -128 .. 127 (int8). A scale may be negative:
the largest weight of a group always uses the negative side, which has one value more. The scale is
the candidate with the least squared error after rounding to bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from coterie.checks import describe
from coterie.errors import CheckpointError, ConfigError
from coterie.keys import Key

CHUNK_SIZE = 1 << 18
"""Weights that are quantized together: as many as the cache of a core holds."""

MIN_GROUP_MAX = 2.0**-100
"""A group with a smaller largest weight becomes zero: its scale would underflow bf16."""


@dataclass(frozen=True)
class QuantFormat:
    """Integers of ``bits`` bits, and one scale for every ``group`` weights along k."""

    bits: Annotated[int, Key("bits")]
    group: Annotated[int, Key("group")]

    def __post_init__(self) -> None:
        if self.bits not in SCALE_RATIOS:
            raise ConfigError(f"{self.bits} bits; known: {', '.join(map(str, SCALE_RATIOS))}")
        if not 8 <= self.group <= 1024 or self.group % 8:
            raise ConfigError(f"a group of {self.group}; it must be a multiple of 8 up to 1024")

    def __str__(self) -> str:
        return f"{self.name} in groups of {self.group}"

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def dtype(self) -> torch.dtype:
        """The storage type: an int8 for each integer, or a byte for two of 4 bits."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def to_dict(self) -> dict[str, object]:
        """The format as JSON values."""
        return {"format": self.name, "group": self.group}

    def storage_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the integers and of the scales of a weight [.., rows, k]."""
        *rows, k = shape
        packed_k = k if self.bits == 8 else -(-k // 2)
        return (*rows, packed_k), (*rows, -(-k // self.group))

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the two tensors of a weight of this shape: ``q`` and ``scales``."""
        values, scales = self.storage_shapes(shape)
        return {"q": (values, self.dtype), "scales": (scales, torch.bfloat16)}


@dataclass(frozen=True)
class QTensor:
    """A quantized weight [.., rows, k].

    A byte of int4 holds two integers, each plus 8, the first in the low bits.
    """

    q: Tensor  # int8 [.., rows, k], or uint8 [.., rows, ceil(k / 2)]
    scales: Tensor  # bf16 [.., rows, ceil(k / group)]
    format: QuantFormat
    k: int

    def __post_init__(self) -> None:
        values_shape, scales_shape = self.format.storage_shapes(self.shape)
        if self.q.dtype is not self.format.dtype or self.q.shape != values_shape:
            raise ValueError(f"{self.format} of {self.k} columns: values {describe(self.q)}")
        if self.scales.dtype is not torch.bfloat16 or self.scales.shape != scales_shape:
            raise ValueError(
                f"{self.format} of shape {list(self.shape)}: scales {describe(self.scales)}, "
                f"not {list(scales_shape)} bf16"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.q.shape[:-1], self.k)

    @property
    def dtype(self) -> torch.dtype:
        """The storage type."""
        return self.q.dtype

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return len(self.q)

    def __getitem__(self, index: int | slice | Tensor) -> QTensor:
        return QTensor(self.q[index], self.scales[index], self.format, self.k)

    def int_values(self) -> Tensor:
        """The integers as int8 [.., rows, k], in either format."""
        if self.format.bits == 8:
            return self.q
        pairs = torch.stack((self.q & 15, self.q >> 4), dim=-1).flatten(-2)[..., : self.k]
        return pairs.to(torch.int8) - 8


def quantize(weight: Tensor, fmt: QuantFormat) -> QTensor:
    """Quantizes a float weight [.., rows, k]; each row depends on itself only.

    Needs a few megabytes beyond the result. Raises CheckpointError for NaN and infinity.
    """
    *outer, k = weight.shape
    rows = weight.reshape(-1, k)
    values, scales = (
        torch.empty(shape, dtype=dtype, device=weight.device)
        for shape, dtype in zip(
            fmt.storage_shapes((len(rows), k)), (fmt.dtype, torch.bfloat16), strict=True
        )
    )
    rows_per_chunk = max(1, CHUNK_SIZE // max(1, k))
    with _single_thread():
        for start in range(0, len(rows), rows_per_chunk):
            chunk = slice(start, start + rows_per_chunk)
            values[chunk], scales[chunk] = _quantize_rows(rows[chunk].float(), fmt)
    values_shape, scales_shape = fmt.storage_shapes((*outer, k))
    return QTensor(values.view(values_shape), scales.view(scales_shape), fmt, k)


def dequantize(weight: QTensor) -> Tensor:
    """fp32 [.., rows, k]; every product is exact."""
    scales = weight.scales.float().repeat_interleave(weight.format.group, dim=-1)
    return weight.int_values().float() * scales[..., : weight.k]


def pack_values(values: Tensor, fmt: QuantFormat) -> Tensor:
    """int8 integers [.., rows, k] in the storage of a ``QTensor``."""
    if fmt.bits == 8:
        return values.contiguous()
    pairs = torch.nn.functional.pad(values, (0, values.shape[-1] % 2)).to(torch.uint8).add_(8)
    pairs = pairs & 15
    return pairs[..., ::2] | (pairs[..., 1::2] << 4)


@contextmanager
def _single_thread() -> Iterator[None]:
    """One thread: many short parallel regions are up to twenty times slower on a busy machine."""
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def _quantize_rows(rows: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Stored integers and scales [rows, groups] of fp32 rows [rows, k]."""
    k = rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, -k % fmt.group))
    values, scales = _quantize_groups(padded.view(-1, fmt.group), fmt)
    values = values.view(padded.shape)[:, :k].to(torch.int8)
    return pack_values(values, fmt), scales.view(len(rows), -1)


def _quantize_groups(x: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Integers in fp32 and bf16 scales [n, 1] of the groups x [n, group]."""
    largest = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    if not bool(torch.isfinite(largest).all()):
        raise CheckpointError("holds NaN or infinity")
    # The sign of the scale makes the largest weight negative.
    absmax_scale = torch.where(largest.abs() < MIN_GROUP_MAX, 0.0, largest / fmt.qmin)  # [n, 1]
    scale = torch.ones_like(absmax_scale)
    min_error = torch.full_like(absmax_scale, torch.inf)
    scaled, rounded = torch.empty_like(x), torch.empty_like(x)
    for ratio in SCALE_RATIOS[fmt.bits]:
        candidate = (absmax_scale * ratio).bfloat16().float()
        _round(x, candidate, fmt, scaled, rounded)
        # In units of absmax_scale, so that the squares of small weights do not underflow.
        error = (
            scaled.sub_(rounded).square_().sum(dim=1, keepdim=True)
            * (candidate / absmax_scale) ** 2
        )
        improved = error < min_error
        min_error = torch.where(improved, error, min_error)
        scale = torch.where(improved, candidate, scale)
    _round(x, scale, fmt, scaled, rounded)
    is_zero = absmax_scale == 0
    return rounded.masked_fill_(is_zero, 0.0), scale.masked_fill(is_zero, 0.0).bfloat16()


def _round(x: Tensor, scale: Tensor, fmt: QuantFormat, scaled: Tensor, rounded: Tensor) -> None:
    """Writes ``x / scale`` and the nearest integer of the format."""
    torch.div(x, scale, out=scaled)
    torch.round(scaled, out=rounded).clamp_(fmt.qmin, -fmt.qmin - 1)


def _scale_ratios(low: float, count: int, lowest: int) -> tuple[float, ...]:
    """Candidates from ``low`` to the ratio at which both sides of the range fit.

    That ratio and 1 make quantizing idempotent.
    """
    high = lowest / (lowest + 1)
    evenly_spaced = (low + (high - low) * step / count for step in range(count))
    return (1.0, high, *(ratio for ratio in evenly_spaced if ratio != 1.0))


SCALE_RATIOS = {8: _scale_ratios(0.92, 8, -128), 4: _scale_ratios(0.72, 28, -8)}
"""By bits: candidate scales, in units of the one that represents the largest weight exactly."""

FORMATS = {"int8": QuantFormat(8, 64), "int4": QuantFormat(4, 32)}
"""The formats of the fast kernels."""


def parse_dense_format(name: str) -> QuantFormat:
    """The format of dense matrices: "int8"."""
    if name != "int8":
        raise ConfigError(f"unknown format {name!r} for dense matrices; known: int8")
    return FORMATS[name]


def parse_format(name: str, group: int | None = None) -> QuantFormat:
    """The format "int8" or "int4"; the group defaults to that of the kernels."""
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r} for experts; known: {', '.join(FORMATS)}")
    default = FORMATS[name]
    return default if group is None else QuantFormat(default.bits, group)
