"""Reading a safetensors file: a checked header, then bytes directly into tensors.

The file is not mapped, because a mapped file counts as memory of the process. Format: 8 bytes of
header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from coterie.errors import CheckpointError, clip, quote
from coterie.files import opened
from coterie.model.quant_methods import REMEDY, method_of_dtype, method_of_tensors
from coterie.strict_json import parse_object

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# The integer types occur only as parts of quantised weights.
DTYPES = FLOAT_DTYPES | {"I8": torch.int8, "U8": torch.uint8}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES, MAX_DIMENSIONS = 100_000_000, 8
CHUNK_BYTES = 4 << 20  # bytes read at once: the processor's caches still hold them when checked


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; ``start`` is its offset in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def part(self, shape: tuple[int, ...], index: int) -> TensorEntry:
        """Number ``index`` of the parts of this shape that follow each other in the tensor."""
        part = replace(self, shape=shape)
        return replace(part, start=self.start + index * part.size)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of the file, in file order.

    Raises CheckpointError, with the file and if possible the tensor, if the file is missing,
    truncated, not safetensors, or has a dtype that is not in DTYPES.
    """
    with opened(file) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as handle:
        file_size = os.fstat(descriptor).st_size
        header_size = _header_size(handle.read(8), file_size)
        listing = parse_object(handle.read(header_size), "a safetensors file")
        listing.pop("__metadata__", None)
        if (title := method_of_tensors(listing)) is not None:
            raise CheckpointError(f"{title} quantised the weights: {REMEDY}")
        entries = [_parse_entry(name, listing[name], 8 + header_size) for name in listing]
        entries.sort(key=lambda entry: (entry.start, entry.size))
        _check_layout(entries, 8 + header_size, file_size)
    return {entry.name: entry for entry in entries}


def read_into(descriptor: int, entry: TensorEntry, view: Tensor) -> None:
    """Reads the tensor into ``view``, which has its shape but may have another dtype.

    Raises CheckpointError for NaN and infinity: in a weight of attention, or of a router, they
    would change an answer without a NaN in the logits.
    """
    if not view.is_contiguous():
        for index, part in enumerate(view):
            read_into(descriptor, entry.part(entry.shape[1:], index), part)
        return
    flat, width = view.view(-1), CHUNK_BYTES // entry.dtype.itemsize
    is_on_cpu = flat.device.type == "cpu"
    is_direct = is_on_cpu and flat.dtype == entry.dtype
    buffer = flat if is_direct else torch.empty(min(width, flat.numel()), dtype=entry.dtype)
    for first in range(0, flat.numel(), width):
        target = flat[first : first + width]
        chunk = target if is_direct else buffer[: target.numel()]
        _read_exact(descriptor, chunk, entry.start + first * entry.dtype.itemsize)
        if not is_direct:
            target.copy_(chunk)
        converted = target if is_on_cpu else chunk.to(flat.dtype)
        if converted.is_floating_point() and not _is_finite(converted):
            dtype = str(flat.dtype).removeprefix("torch.")
            raise CheckpointError(f"{clip(entry.name)} holds NaN or infinity in {dtype}")


def read_rows(
    descriptor: int, entry: TensorEntry
) -> Iterator[tuple[tuple[int | slice, ...], Tensor]]:
    """The rows of a float tensor in fp32, a few megabytes at a time, each with its index."""
    shape: Sequence[int] = entry.shape
    count, k, *more = shape
    if more:
        for outer in range(count):
            for index, rows in read_rows(descriptor, entry.part((k, *more), outer)):
                yield (outer, *index), rows
        return
    step = max(1, CHUNK_BYTES // 4 // k)
    for first in range(0, count, step):
        rows = torch.empty(min(step, count - first), k)
        tail = entry.part((k,), first)
        read_into(descriptor, replace(tail, shape=tuple(rows.shape)), rows)
        yield (slice(first, first + len(rows)),), rows


def read_chunks(descriptor: int, entry: TensorEntry) -> Iterator[Tensor]:
    """The bytes of a tensor, a few megabytes at a time."""
    for first in range(0, entry.size, CHUNK_BYTES):
        piece = torch.empty(min(CHUNK_BYTES, entry.size - first), dtype=torch.uint8)
        _read_exact(descriptor, piece, entry.start + first)
        yield piece


def not_float_message(name: str, dtype: str) -> str:
    """The message for a tensor of a dtype that is not a float."""
    if (title := method_of_dtype(dtype)) is not None:
        return f"{name} is {dtype}: {title} quantised the weights: {REMEDY}"
    return f"{name} is {dtype}; supported: {', '.join(FLOAT_DTYPES)}"


def _header_size(prefix: bytes, file_size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"truncated: {file_size} bytes, too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"not a safetensors file (a header of {length} bytes)")
    if 8 + length > file_size:
        raise CheckpointError(f"truncated: its header needs {8 + length} of {file_size} bytes")
    return length


def _parse_entry(name: str, fields: object, offset: int) -> TensorEntry:
    label = clip(name)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{label}: its header entry is not dtype, shape, data_offsets")
    dtype = fields["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(not_float_message(label, clip(str(dtype))))
    shape, offsets = _int_tuple(fields["shape"]), _int_tuple(fields["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{label}: shape or data_offsets are not whole numbers")
    entry, size = (
        TensorEntry(name, DTYPES[dtype], shape, offset + offsets[0]),
        offsets[1] - offsets[0],
    )
    if size != entry.size:
        raise CheckpointError(
            f"{label} has {size} bytes, but its shape {quote([*shape])} needs {quote(entry.size)}"
        )
    return entry


def _int_tuple(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        return None
    return None if any(type(x) is not int or x < 0 for x in value) else tuple(value)


def _check_layout(entries: list[TensorEntry], data_start: int, file_size: int) -> None:
    """Checks that the tensors fill the file without gap, overlap or truncation."""
    end = data_start
    for entry in entries:
        label = clip(entry.name)
        if entry.start != end:
            raise CheckpointError(f"{label} starts at {entry.start}, expected {end}")
        end += entry.size
        if end > file_size:
            raise CheckpointError(f"truncated: {label} ends at byte {end}, the file at {file_size}")
    if end != file_size:
        raise CheckpointError(f"{file_size - end} bytes follow the last tensor")


def _is_finite(values: Tensor) -> bool:
    low, high = torch.aminmax(values)  # one pass; both are NaN if any value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _read_exact(descriptor: int, flat: Tensor, start: int) -> None:
    memory = flat.view(torch.uint8).numpy().data
    while memory:
        read = os.preadv(descriptor, [memory[: 1 << 28]], start)
        if read == 0:
            raise CheckpointError("cannot be read to its end: it became shorter while being read")
        memory, start = memory[read:], start + read
