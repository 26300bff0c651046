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

from coterie.model.strictjson import parse_object
from coterie.naming import CoterieError

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = FLOATS | {"I8": torch.int8, "U8": torch.uint8}  # these two only as parts of quantised ones
LONGEST_HEADER = 100_000_000
CHUNK = 4 << 20  # bytes read at once where dtype or device differ


@dataclass(frozen=True)
class Entry:
    """One tensor in a shard; ``start`` counts from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, Entry]:
    """What the file holds, in file order.

    Raises CoterieError, naming the file and where it can the tensor, when the file is missing,
    truncated, not safetensors, or holds a dtype that is not a plain float.
    """
    try:
        with file.open("rb") as handle:
            whole = os.fstat(handle.fileno()).st_size
            header = _header_bytes(handle.read(8), whole, file)
            raw = handle.read(header)
    except OSError as error:
        raise CoterieError(f"{file}: cannot be read ({error.strerror})") from None
    listed = parse_object(raw, str(file), "a safetensors file")
    listed.pop("__metadata__", None)
    entries = [_entry(name, fields, 8 + header, file) for name, fields in listed.items()]
    entries.sort(key=lambda entry: (entry.start, entry.size))
    _check_layout(entries, 8 + header, whole, file)
    return {entry.name: entry for entry in entries}


def read_into(descriptor: int, entry: Entry, view: Tensor) -> None:
    """Copy the tensor's bytes into ``view``, which has its shape but perhaps another dtype."""
    if not view.is_contiguous():
        step = entry.size // entry.shape[0]
        for number, part in enumerate(view):
            start = entry.start + number * step
            read_into(descriptor, Entry(entry.name, entry.dtype, entry.shape[1:], start), part)
        return
    flat = view.view(-1)
    if flat.device.type == "cpu" and flat.dtype == entry.dtype:
        _fill(descriptor, flat, entry.start)
        return
    width = CHUNK // entry.dtype.itemsize
    buffer = torch.empty(min(width, flat.numel()), dtype=entry.dtype)
    for first in range(0, flat.numel(), width):
        part = flat[first : first + width]
        read = buffer[: part.numel()]
        _fill(descriptor, read, entry.start + first * entry.dtype.itemsize)
        part.copy_(read)


def rows_of(descriptor: int, entry: Entry) -> Iterator[tuple[tuple[int | slice, ...], Tensor]]:
    """A float tensor's rows in fp32, a few megabytes at a time, each with its place in it."""
    deep = len(entry.shape) > 2
    if deep:
        part = entry.size // entry.shape[0]
        for number in range(entry.shape[0]):
            start = entry.start + number * part
            inner = Entry(entry.name, entry.dtype, entry.shape[1:], start)
            for place, rows in rows_of(descriptor, inner):
                yield (number, *place), rows
        return
    count, k = entry.shape
    step = max(1, CHUNK // 4 // k)
    for first in range(0, count, step):
        rows = torch.empty(min(step, count - first), k)
        start = entry.start + first * k * entry.dtype.itemsize
        read_into(descriptor, Entry(entry.name, entry.dtype, tuple(rows.shape), start), rows)
        yield (slice(first, first + len(rows)),), rows


def bytes_of(descriptor: int, entry: Entry) -> Iterator[Tensor]:
    """A tensor's bytes as they are, a few megabytes at a time."""
    for first in range(0, entry.size, CHUNK):
        piece = torch.empty(min(CHUNK, entry.size - first), dtype=torch.uint8)
        _fill(descriptor, piece, entry.start + first)
        yield piece


def no_float(name: str, dtype: str) -> str:
    """Why a tensor of this safetensors dtype is no weight."""
    return f"{name} is {dtype}; weights load from {', '.join(FLOATS)}, quantised ones do not"


def _header_bytes(prefix: bytes, whole: int, file: Path) -> int:
    if len(prefix) < 8:
        raise CoterieError(f"{file}: truncated: {whole} bytes, too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > LONGEST_HEADER:
        raise CoterieError(f"{file}: not a safetensors file (a header of {length} bytes)")
    if 8 + length > whole:
        raise CoterieError(f"{file}: truncated: its header needs {8 + length} of {whole} bytes")
    return length


def _entry(name: str, fields: object, offset: int, file: Path) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CoterieError(f"{file}: {name}: its header entry is not dtype, shape, data_offsets")
    if fields["dtype"] not in DTYPES:
        raise CoterieError(f"{file}: {no_float(name, str(fields['dtype']))}")
    shape, ends = _whole(fields["shape"]), _whole(fields["data_offsets"])
    if shape is None or ends is None or len(ends) != 2:
        raise CoterieError(f"{file}: {name}: shape or data_offsets are not whole numbers")
    entry = Entry(name, DTYPES[fields["dtype"]], shape, offset + ends[0])
    if ends[1] - ends[0] != entry.size:
        raise CoterieError(
            f"{file}: {name} has {ends[1] - ends[0]} bytes, but its shape {list(shape)} "
            f"needs {entry.size}"
        )
    return entry


def _whole(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or any(type(x) is not int or x < 0 for x in value):
        return None
    return tuple(value)


def _check_layout(entries: list[Entry], begin: int, whole: int, file: Path) -> None:
    """The tensors fill the file one after the other: no gap, no overlap, no missing end."""
    end = begin
    for entry in entries:
        if entry.start != end:
            raise CoterieError(f"{file}: {entry.name} starts at {entry.start}, expected {end}")
        end += entry.size
        if end > whole:
            raise CoterieError(
                f"{file}: truncated: {entry.name} ends at byte {end}, the file at {whole}"
            )
    if end != whole:
        raise CoterieError(f"{file}: {whole - end} bytes follow the last tensor")


def _fill(descriptor: int, flat: Tensor, start: int) -> None:
    memory = flat.view(torch.uint8).numpy().data
    while memory:
        read = os.preadv(descriptor, [memory[: 1 << 28]], start)
        if read == 0:
            raise CoterieError("cannot be read to its end: it became shorter meanwhile")
        memory, start = memory[read:], start + read
