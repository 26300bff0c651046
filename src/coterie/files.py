"""Reading and writing files: only regular files are read, and written ones are whole or absent."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path

from coterie.errors import CheckpointError, CoterieError

MIB = 1 << 20


@dataclass(frozen=True)
class OpenFiles:
    """Descriptors of files that are read in turns."""

    descriptors: dict[Path, int] = field(default_factory=dict)

    def descriptor(self, file: Path) -> int:
        if file not in self.descriptors:
            self.descriptors[file] = open_file(file)
        return self.descriptors[file]

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


def open_file(file: Path) -> int:
    """A descriptor to read a regular file; opening a named pipe or a device neither waits nor acts.

    Raises OSError or CheckpointError, without the name, for anything else.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("cannot be read (not a regular file)")
    return descriptor


@contextmanager
def read_errors(file: Path) -> Iterator[None]:
    """Errors of reading a file become CheckpointError with its name."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except CoterieError as error:
        raise CheckpointError(f"{file}: {error}") from None


@contextmanager
def opened(file: Path) -> Iterator[int]:
    """The descriptor of a regular file; errors inside are those of reading it."""
    with read_errors(file):
        descriptor = open_file(file)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def read_file(file: Path, limit: int) -> bytes:
    """The content of a regular file; raises CheckpointError if it has more than ``limit`` bytes."""
    with opened(file) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as source:
        size = os.fstat(descriptor).st_size
        content = b"" if size > limit else source.read(size + 1)
        if max(size, len(content)) > limit:
            raise CheckpointError(f"too large: {size:,} bytes, at most {limit / MIB:g} MiB")
    return content


def read_text(file: Path, limit: int) -> str:
    """The content as UTF-8 text."""
    content = read_file(file, limit)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text ({error.reason})") from None


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


def atomic_write_json(path: Path, content: Mapping[str, object]) -> None:
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def remove_partial(path: Path) -> None:
    """Remove the partial file that a killed process left."""
    _partial_path(path).unlink(missing_ok=True)


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")
