"""One safetensors file, read without mapping it: a checked header, then bytes straight into place.

A mapped file counts towards the memory of the process for as long as it is mapped; reads into a
small buffer do not. Format: 8 bytes of header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from coterie.errors import CoterieError
from coterie.strict_json import parse_object

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = FLOAT_DTYPES | {
    "I8": torch.int8,
    "U8": torch.uint8,
}  # these two only as parts of quantised ones
MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 4 << 20  # bytes read at once where dtype or device differ


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a shard; ``start`` counts from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorEntry]:
    """What the file holds, in file order.

    Raises CoterieError, naming the file and where it can the tensor, when the file is missing,
    truncated, not safetensors, or holds a dtype that is not a plain float.
    """
    try:
        with file.open("rb") as handle:
            file_size = os.fstat(handle.fileno()).st_size
            header_size = _header_size(handle.read(8), file_size, file)
            raw = handle.read(header_size)
    except OSError as error:
        raise CoterieError(f"{file}: cannot be read ({error.strerror})") from None
    listing = parse_object(raw, str(file), "a safetensors file")
    listing.pop("__metadata__", None)
    entries = [
        _parse_entry(name, fields, 8 + header_size, file) for name, fields in listing.items()
    ]
    entries.sort(key=lambda entry: (entry.start, entry.size))
    _check_layout(entries, 8 + header_size, file_size, file)
    return {entry.name: entry for entry in entries}


def read_into(descriptor: int, entry: TensorEntry, view: Tensor) -> None:
    """Copy the tensor's bytes into ``view``, which has its shape but perhaps another dtype."""
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
    """A float tensor's rows in fp32, a few megabytes at a time, each with its place in it."""
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
    """A tensor's bytes as they are, a few megabytes at a time."""
    for first in range(0, entry.size, CHUNK_BYTES):
        piece = torch.empty(min(CHUNK_BYTES, entry.size - first), dtype=torch.uint8)
        _read_exact(descriptor, piece, entry.start + first)
        yield piece


def not_float_message(name: str, dtype: str) -> str:
    """Why a tensor of this safetensors dtype is no weight."""
    return f"{name} is {dtype}; weights load from {', '.join(FLOAT_DTYPES)}, quantised ones do not"


def _header_size(prefix: bytes, file_size: int, file: Path) -> int:
    if len(prefix) < 8:
        raise CoterieError(
            f"{file}: truncated: {file_size} bytes, too short for a safetensors file"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CoterieError(f"{file}: not a safetensors file (a header of {length} bytes)")
    if 8 + length > file_size:
        raise CoterieError(f"{file}: truncated: its header needs {8 + length} of {file_size} bytes")
    return length


def _parse_entry(name: str, fields: object, offset: int, file: Path) -> TensorEntry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CoterieError(f"{file}: {name}: its header entry is not dtype, shape, data_offsets")
    if fields["dtype"] not in DTYPES:
        raise CoterieError(f"{file}: {not_float_message(name, str(fields['dtype']))}")
    shape, offsets = _int_tuple(fields["shape"]), _int_tuple(fields["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2:
        raise CoterieError(f"{file}: {name}: shape or data_offsets are not whole numbers")
    entry = TensorEntry(name, DTYPES[fields["dtype"]], shape, offset + offsets[0])
    if offsets[1] - offsets[0] != entry.size:
        raise CoterieError(
            f"{file}: {name} has {offsets[1] - offsets[0]} bytes, but its shape {list(shape)} "
            f"needs {entry.size}"
        )
    return entry


def _int_tuple(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or any(type(x) is not int or x < 0 for x in value):
        return None
    return tuple(value)


def _check_layout(entries: list[TensorEntry], data_start: int, file_size: int, file: Path) -> None:
    """The tensors fill the file one after the other: no gap, no overlap, no missing end."""
    end = data_start
    for entry in entries:
        if entry.start != end:
            raise CoterieError(f"{file}: {entry.name} starts at {entry.start}, expected {end}")
        end += entry.size
        if end > file_size:
            raise CoterieError(
                f"{file}: truncated: {entry.name} ends at byte {end}, the file at {file_size}"
            )
    if end != file_size:
        raise CoterieError(f"{file}: {file_size - end} bytes follow the last tensor")


def _read_exact(descriptor: int, flat: Tensor, start: int) -> None:
    memory = flat.view(torch.uint8).numpy().data
    while memory:
        read = os.preadv(descriptor, [memory[: 1 << 28]], start)
        if read == 0:
            raise CoterieError("cannot be read to its end: it became shorter meanwhile")
        memory, start = memory[read:], start + read
