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

from coterie.naming import CoterieError
from coterie.ops import cpu

HOST, DISK = "host", "disk"
PAGE = 4096  # what the address, the place and the size of a read past the cache are multiples of


class Tier(Protocol):
    """A memory that holds every expert of every layer."""

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        """All bytes of an expert into ``into`` [bytes] uint8, or a CoterieError; from any thread,
        several at once. The name of the memory that it was found in."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Every expert in host memory: of each layer [E, bytes of one] uint8."""

    blobs: Mapping[int, Tensor]

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        into.copy_(self.blobs[layer][expert])
        return HOST


@dataclass(frozen=True)
class Stamp:
    """What shows that a file is another than it was, or has been written to."""

    inode: int
    size: int
    written: int  # when, in nanoseconds

    @staticmethod
    def of(path: Path) -> Stamp | None:
        """None where there is no such file, or nobody may look."""
        try:
            found = path.stat()
        except OSError:
            return None
        return Stamp(found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Blobs:
    """A layer's experts in a file, one after the other from ``start`` on."""

    path: Path
    start: int
    size: int  # bytes from one expert to the next
    checksums: tuple[int, ...]  # CRC-32 of each expert
    stamp: Stamp | None = None  # of the file when the model was loaded

    @property
    def remedy(self) -> str:
        """What to do where an expert is not as it was written."""
        if self.stamp in (None, Stamp.of(self.path)):
            return "copy or convert the model again"
        return "the file was changed after the model was loaded: load it again"


@dataclass(frozen=True)
class OnDisk:
    """Every expert in files, read past the system's cache, or else let go from it: there is one
    cache of experts, the store's own, and its budget is what was asked for. Checksums decide
    whether an expert is what it was; that a file was changed only explains why not."""

    layers: Mapping[int, Blobs]

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        """Raises CoterieError for a file that is gone, cut off, or not what was written."""
        blobs = self.layers[layer]
        what = f"{blobs.path}: expert {expert} of layer {layer}"
        view, at = into.numpy().data, blobs.start + expert * blobs.size
        try:
            done = _read(blobs.path, at, view, unit=_unit(at, blobs.size, into.data_ptr()))
        except OSError as error:
            raise CoterieError(f"{what} cannot be read ({error.strerror})") from None
        if done < blobs.size:
            told = f"{what} ends after {done} of {blobs.size} bytes"
            raise CoterieError(f"{told}; {blobs.remedy}")
        if cpu.crc32(into) != blobs.checksums[expert]:
            raise CoterieError(f"{what} is not what was written; {blobs.remedy}")
        return DISK


def _unit(*places: int) -> int:
    """What a read comes in whole numbers of: a page where it can go past the cache, else a byte."""
    past = hasattr(os, "O_DIRECT") and not any(place % PAGE for place in places)
    return PAGE if past else 1


def _read(path: Path, at: int, view: memoryview, *, unit: int) -> int:
    """How many bytes from ``at`` on are in ``view``; fewer than it holds where the file ends."""
    done = 0
    with _opened(path, past=unit == PAGE) as file:
        file.seek(at)
        while done < len(view):
            got = file.readinto(view[done:])
            done += got or 0
            # Past the cache, what is no whole page is the end, and nothing can be asked behind it.
            if not got or done % unit:
                break
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), at, len(view), os.POSIX_FADV_DONTNEED)
    return done


def _opened(path: Path, *, past: bool) -> FileIO:
    """To be read past the system's cache where that is asked for and its file system can."""
    if past:
        try:
            return FileIO(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return FileIO(path, "rb")
