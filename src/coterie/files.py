"""Reading and writing files: only regular files are read, and written ones are whole or absent."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path

from coterie.errors import CheckpointError

MIB = 1 << 20


def open_file(file: Path) -> int:
    """A descriptor to read a regular file; opening a named pipe or a device neither waits nor acts.

    Raises CheckpointError for anything else.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{file}: cannot be read (not a regular file)")
    return descriptor


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """The descriptor of ``open_file``; raises CheckpointError if reading from it fails."""
    descriptor = open_file(file)
    try:
        yield descriptor
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)


def read_file(file: Path, limit: int) -> bytes:
    """The content of a regular file; raises CheckpointError if it has more than ``limit`` bytes."""
    with opened(file) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as source:
        size = os.fstat(descriptor).st_size
        content = b"" if size > limit else source.read(limit + 1)
    if max(size, len(content)) > limit:
        raise CheckpointError(f"{file}: too large: {size:,} bytes, at most {limit / MIB:g} MiB")
    return content


def read_text(file: Path, limit: int) -> str:
    """The content as UTF-8 text."""
    try:
        return read_file(file, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not readable as UTF-8 text ({error.reason})") from None


@contextmanager
def atomic_writer(path: Path, remedy: str = "") -> Iterator[BufferedWriter]:
    """A file that appears under its name once it is complete and on disk, or not at all.

    Raises CheckpointError, which ends in ``remedy``, if it cannot be written.
    """
    part = _partial_path(path)
    try:
        with part.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}){remedy}") from None
    finally:
        part.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes) -> None:
    with atomic_writer(path) as sink:
        sink.write(content)


def remove_partial(path: Path) -> None:
    """Remove the partial file that a killed process left."""
    _partial_path(path).unlink(missing_ok=True)


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")
