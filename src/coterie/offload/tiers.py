"""Where all experts lie, for a store that keeps only some of them: whole blobs, fetched by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

from torch import Tensor

from coterie.errors import CoterieError
from coterie.ops import cpu

HOST, DISK = "host", "disk"
PAGE_BYTES = (
    4096  # what the address, the place and the size of a read past the cache are multiples of
)


class Tier(Protocol):
    """A memory that holds every expert of every layer."""

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        """All bytes of an expert into ``into`` [bytes] uint8, or a CoterieError; from any thread,
        several at once. The name of the memory that it was found in."""
        ...


@dataclass(frozen=True)
class HostTier:
    """Every expert in host memory: of each layer [E, bytes of one] uint8."""

    blobs: Mapping[int, Tensor]

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        target.copy_(self.blobs[layer][expert])
        return HOST


@dataclass(frozen=True)
class FileIdentity:
    """What shows that a file is another than it was, or has been written to."""

    inode: int
    size: int
    mtime_ns: int  # when, in nanoseconds

    @staticmethod
    def of(path: Path) -> FileIdentity | None:
        """None where there is no such file, or nobody may look."""
        try:
            stat = path.stat()
        except OSError:
            return None
        return FileIdentity(stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class ExpertFileSpan:
    """A layer's experts in a file, one after the other from ``start`` on."""

    path: Path
    start: int
    expert_bytes: int  # bytes from one expert to the next
    checksums: tuple[int, ...]  # CRC-32 of each expert
    identity: FileIdentity | None = None  # of the file when the model was loaded

    @property
    def remedy(self) -> str:
        """What to do where an expert is not as it was written."""
        if self.identity in (None, FileIdentity.of(self.path)):
            return "copy or convert the model again"
        return "the file was changed after the model was loaded: load it again"


@dataclass(frozen=True)
class DiskTier:
    """Every expert in files, read past the system's cache, or else let go from it: there is one
    cache of experts, the store's own, and its budget is what was asked for. Checksums decide
    whether an expert is what it was; that a file was changed only explains why not."""

    spans: Mapping[int, ExpertFileSpan]

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        """Raises CoterieError for a file that is gone, cut off, or not what was written."""
        span = self.spans[layer]
        label = f"{span.path}: expert {expert} of layer {layer}"
        view, offset = target.numpy().data, span.start + expert * span.expert_bytes
        try:
            bytes_read = _read(
                span.path,
                offset,
                view,
                unit=_read_unit(offset, span.expert_bytes, target.data_ptr()),
            )
        except OSError as error:
            raise CoterieError(f"{label} cannot be read ({error.strerror})") from None
        if bytes_read < span.expert_bytes:
            message = f"{label} ends after {bytes_read} of {span.expert_bytes} bytes"
            raise CoterieError(f"{message}; {span.remedy}")
        if cpu.crc32(target) != span.checksums[expert]:
            raise CoterieError(f"{label} is not what was written; {span.remedy}")
        return DISK


def _read_unit(*values: int) -> int:
    """What a read comes in whole numbers of: a page where it can go past the cache, else a byte."""
    direct = hasattr(os, "O_DIRECT") and not any(value % PAGE_BYTES for value in values)
    return PAGE_BYTES if direct else 1


def _read(path: Path, offset: int, view: memoryview, *, unit: int) -> int:
    """How many bytes from ``at`` on are in ``view``; fewer than it holds where the file ends."""
    bytes_read = 0
    with _open_file(path, direct=unit == PAGE_BYTES) as file:
        file.seek(offset)
        while bytes_read < len(view):
            count = file.readinto(view[bytes_read:])
            bytes_read += count or 0
            # Past the cache, what is no whole page is the end, and nothing can be asked behind it.
            if not count or bytes_read % unit:
                break
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), offset, len(view), os.POSIX_FADV_DONTNEED)
    return bytes_read


def _open_file(path: Path, *, direct: bool) -> FileIO:
    """To be read past the system's cache where that is asked for and its file system can."""
    if direct:
        try:
            return FileIO(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return FileIO(path, "rb")
