"""Reading a safetensors file: a checked header, then bytes directly into tensors.

The file is not mapped, because a mapped file counts as memory of the process. Format: 8 bytes of
header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from coterie.errors import CheckpointError
from coterie.strict_json import parse_object

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# The integer types occur only as parts of quantised weights.
DTYPES = FLOAT_DTYPES | {"I8": torch.int8, "U8": torch.uint8}
MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 4 << 20  # bytes read at once if dtype or device differ


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


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of the file, in file order.

    Raises CheckpointError, with the file and if possible the tensor, if the file is missing,
    truncated, not safetensors, or has a dtype that is not in DTYPES.
    """
    try:
        with file.open("rb") as handle:
            file_size = os.fstat(handle.fileno()).st_size
            header_size = _header_size(handle.read(8), file_size, file)
            raw = handle.read(header_size)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    listing = parse_object(raw, str(file), "a safetensors file")
    listing.pop("__metadata__", None)
    entries = [
        _parse_entry(name, fields, 8 + header_size, file) for name, fields in listing.items()
    ]
    entries.sort(key=lambda entry: (entry.start, entry.size))
    _check_layout(entries, 8 + header_size, file_size, file)
    return {entry.name: entry for entry in entries}


def read_into(descriptor: int, entry: TensorEntry, view: Tensor) -> None:
    """Reads the tensor into ``view``, which has its shape but may have another dtype."""
    if not view.is_contiguous():
        part_size = entry.size // entry.shape[0]
        for index, part in enumerate(view):
            start = entry.start + index * part_size
            read_into(
                descriptor, TensorEntry(entry.name, entry.dtype, entry.shape[1:], start), part
            )
        return
    flat = view.view(-1)
    if flat.device.type == "cpu" and flat.dtype == entry.dtype:
        _read_exact(descriptor, flat, entry.start)
        return
    width = CHUNK_BYTES // entry.dtype.itemsize
    buffer = torch.empty(min(width, flat.numel()), dtype=entry.dtype)
    for first in range(0, flat.numel(), width):
        part = flat[first : first + width]
        read = buffer[: part.numel()]
        _read_exact(descriptor, read, entry.start + first * entry.dtype.itemsize)
        part.copy_(read)


def read_rows(
    descriptor: int, entry: TensorEntry
) -> Iterator[tuple[tuple[int | slice, ...], Tensor]]:
    """The rows of a float tensor in fp32, a few megabytes at a time, each with its index."""
    is_stacked = len(entry.shape) > 2
    if is_stacked:
        part = entry.size // entry.shape[0]
        for outer in range(entry.shape[0]):
            start = entry.start + outer * part
            inner_entry = TensorEntry(entry.name, entry.dtype, entry.shape[1:], start)
            for index, rows in read_rows(descriptor, inner_entry):
                yield (outer, *index), rows
        return
    count, k = entry.shape
    step = max(1, CHUNK_BYTES // 4 // k)
    for first in range(0, count, step):
        rows = torch.empty(min(step, count - first), k)
        start = entry.start + first * k * entry.dtype.itemsize
        read_into(descriptor, TensorEntry(entry.name, entry.dtype, tuple(rows.shape), start), rows)
        yield (slice(first, first + len(rows)),), rows


def read_chunks(descriptor: int, entry: TensorEntry) -> Iterator[Tensor]:
    """The bytes of a tensor, a few megabytes at a time."""
    for first in range(0, entry.size, CHUNK_BYTES):
        piece = torch.empty(min(CHUNK_BYTES, entry.size - first), dtype=torch.uint8)
        _read_exact(descriptor, piece, entry.start + first)
        yield piece


def not_float_message(name: str, dtype: str) -> str:
    """The message for a tensor of a dtype that is not a float."""
    return f"{name} is {dtype}; supported: {', '.join(FLOAT_DTYPES)}"


def _header_size(prefix: bytes, file_size: int, file: Path) -> int:
    if len(prefix) < 8:
        raise CheckpointError(
            f"{file}: truncated: {file_size} bytes, too short for a safetensors file"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: not a safetensors file (a header of {length} bytes)")
    if 8 + length > file_size:
        raise CheckpointError(
            f"{file}: truncated: its header needs {8 + length} of {file_size} bytes"
        )
    return length


def _parse_entry(name: str, fields: object, offset: int, file: Path) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file}: {name}: its header entry is not dtype, shape, data_offsets")
    if fields["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: {not_float_message(name, str(fields['dtype']))}")
    shape, offsets = _int_tuple(fields["shape"]), _int_tuple(fields["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(f"{file}: {name}: shape or data_offsets are not whole numbers")
    entry = TensorEntry(name, DTYPES[fields["dtype"]], shape, offset + offsets[0])
    if offsets[1] - offsets[0] != entry.size:
        raise CheckpointError(
            f"{file}: {name} has {offsets[1] - offsets[0]} bytes, but its shape {list(shape)} "
            f"needs {entry.size}"
        )
    return entry


def _int_tuple(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or any(type(x) is not int or x < 0 for x in value):
        return None
    return tuple(value)


def _check_layout(entries: list[TensorEntry], data_start: int, file_size: int, file: Path) -> None:
    """Checks that the tensors fill the file without gap, overlap or truncation."""
    end = data_start
    for entry in entries:
        if entry.start != end:
            raise CheckpointError(f"{file}: {entry.name} starts at {entry.start}, expected {end}")
        end += entry.size
        if end > file_size:
            raise CheckpointError(
                f"{file}: truncated: {entry.name} ends at byte {end}, the file at {file_size}"
            )
    if end != file_size:
        raise CheckpointError(f"{file}: {file_size - end} bytes follow the last tensor")


def _read_exact(descriptor: int, flat: Tensor, start: int) -> None:
    memory = flat.view(torch.uint8).numpy().data
    while memory:
        read = os.preadv(descriptor, [memory[: 1 << 28]], start)
        if read == 0:
            raise CheckpointError("cannot be read to its end: it became shorter while being read")
        memory, start = memory[read:], start + read
