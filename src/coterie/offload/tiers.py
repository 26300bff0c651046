"""Tiers: memories that hold every expert as one blob of bytes, for a store to fetch from."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

from torch import Tensor

from coterie.errors import OffloadError
from coterie.ops import cpu

HOST, DISK = "host", "disk"
PAGE_BYTES = 4096  # direct reads need an address, offset and size that are multiples of this


class Tier(Protocol):
    """A memory that holds every expert of every layer."""

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        """Copy an expert into ``target`` [bytes] uint8; returns the name of the tier that had it.

        Thread-safe. Raises OffloadError if the expert cannot be read.
        """
        ...


@dataclass(frozen=True)
class HostTier:
    """Every expert in host memory."""

    blobs: Mapping[int, Tensor]  # by layer: [E, bytes of an expert] uint8

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        target.copy_(self.blobs[layer][expert])
        return HOST


@dataclass(frozen=True)
class FileIdentity:
    """Facts that change when a file is replaced or written to."""

    inode: int
    size: int
    mtime_ns: int

    @staticmethod
    def of(path: Path) -> FileIdentity | None:
        """None if there is no such file or no permission to see it."""
        try:
            stat = path.stat()
        except OSError:
            return None
        return FileIdentity(stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class ExpertFileSpan:
    """A layer's experts in a file, stored contiguously from ``start`` on."""

    path: Path
    start: int
    expert_bytes: int
    checksums: tuple[int, ...]  # CRC-32 of each expert
    identity: FileIdentity | None = None  # of the file when the model was loaded

    @property
    def remedy(self) -> str:
        """What to do about an expert with a wrong checksum."""
        if self.identity in (None, FileIdentity.of(self.path)):
            return "copy or convert the model again"
        return "the file was changed after the model was loaded: load it again"


@dataclass(frozen=True)
class DiskTier:
    """Every expert in files, read without the system's file cache.

    The store's own cache is the only one, so the memory stays within its budget. Direct reads
    bypass the file cache; where they are not possible, the pages are dropped after the read. An
    expert is accepted by its checksum; a file's identity only explains a mismatch.
    """

    spans: Mapping[int, ExpertFileSpan]

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        """Raises OffloadError for a file that is missing, truncated or changed."""
        span = self.spans[layer]
        label = f"{span.path}: expert {expert} of layer {layer}"
        view, offset = target.numpy().data, span.start + expert * span.expert_bytes
        unit = _read_unit(offset, span.expert_bytes, target.data_ptr())
        try:
            bytes_read = _read(span.path, offset, view, unit=unit)
        except OSError as error:
            raise OffloadError(f"{label} cannot be read ({error.strerror})") from None
        if bytes_read < span.expert_bytes:
            message = f"{label} ends after {bytes_read} of {span.expert_bytes} bytes"
            raise OffloadError(f"{message}; {span.remedy}")
        if cpu.crc32(target) != span.checksums[expert]:
            raise OffloadError(f"{label} has a wrong checksum; {span.remedy}")
        return DISK


def _read_unit(*values: int) -> int:
    """The size that reads are a multiple of: a page for direct reads, otherwise one byte."""
    direct = hasattr(os, "O_DIRECT") and not any(value % PAGE_BYTES for value in values)
    return PAGE_BYTES if direct else 1


def _read(path: Path, offset: int, view: memoryview, *, unit: int) -> int:
    """Fill ``view`` from ``offset``; returns the bytes read, fewer at the end of a file."""
    bytes_read = 0
    with _open_file(path, direct=unit == PAGE_BYTES) as file:
        file.seek(offset)
        while bytes_read < len(view):
            count = file.readinto(view[bytes_read:])
            bytes_read += count or 0
            # A direct read that is not a multiple of a page has reached the end of the file.
            if not count or bytes_read % unit:
                break
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), offset, len(view), os.POSIX_FADV_DONTNEED)
    return bytes_read


def _open_file(path: Path, *, direct: bool) -> FileIO:
    """Open for direct reads if requested and supported by the file system."""
    if direct:
        try:
            return FileIO(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return FileIO(path, "rb")
