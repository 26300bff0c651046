"""One safetensors file, read without mapping it: a checked header, then bytes straight into place.

A mapped file counts towards the memory of the process for as long as it is mapped; reads into a
small buffer do not. Format: 8 bytes of header length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from coterie.model.strictjson import parse_object
from coterie.naming import CoterieError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
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
        known = ", ".join(DTYPES)
        raise CoterieError(
            f"{file}: {name} is {fields['dtype']}; weights load from {known}, quantised ones do not"
        )
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
