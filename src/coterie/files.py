"""Reading and writing files: only regular files are read, and written ones are whole or absent."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Self

from coterie.errors import CheckpointError, ConfigError, CoterieError

MIB = 1 << 20
LFS_START = b"version https://git-lfs.github.com/spec/"
MAX_LFS_BYTES = 1024
MAX_READ = 64 * MIB

ProgressCallback = Callable[[int, int], None]
"""Called with (bytes read, bytes in total)."""


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
    try:
        _check_content(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_content(descriptor: int) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("cannot be read (not a regular file)")
    is_small = status.st_size < MAX_LFS_BYTES
    if is_small and os.pread(descriptor, len(LFS_START), 0) == LFS_START:
        raise CheckpointError(
            "is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again"
        )


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
        if len(content) < size:
            raise CheckpointError(f"cannot be read ({len(content):,} of {size:,} bytes)")
    return content


def read_text(file: Path, limit: int) -> str:
    """The content as UTF-8 text, without a byte order mark."""
    content = read_file(file, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text ({error.reason})") from None


@contextmanager
def atomic_writer(path: Path, remedy: str = "") -> Iterator[BufferedWriter]:
    """A file that appears under its name once it is complete and on disk, or not at all.

    Raises CheckpointError, which ends in ``remedy``, if it cannot be written; a device or a pipe
    of this name is never replaced.
    """
    part = _partial_path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file")
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


class LockedFile:
    """A regular file to append to that no other process can open in the same way.

    Methods raise its ``error``, with the name, where the system fails.
    """

    def __init__(self, path: Path, error: type[CoterieError] = ConfigError) -> None:
        """Raises an ``error`` if the file cannot be written, or another process writes it."""
        self.path, self._error = path, error
        while True:
            with self._errors("written"):
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
                self._descriptor = os.open(path, flags, 0o666)
            try:
                self._lock()
                if self._has_name():
                    return
            except BaseException:
                self.close()
                raise
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> bytes:
        """The whole content: less than its size is an error, and no reason to write it anew."""
        content = b""
        with self._errors("read"):
            while piece := os.pread(self._descriptor, MAX_READ, len(content)):
                content += piece
            if len(content) < self.size:
                raise OSError(errno.EIO, "its end is missing")
        return content

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def append(self, content: bytes, *, sync: bool = False) -> None:
        """Write all bytes; if that fails, raise an error, and the file ends as before."""
        end = self.size
        try:
            with self._errors("written"):
                while content:
                    content = content[os.write(self._descriptor, content) :]
                if sync:
                    os.fsync(self._descriptor)
        except CoterieError:
            self.truncate(end)
            raise

    def truncate(self, size: int = 0) -> None:
        with self._errors("written"):
            os.ftruncate(self._descriptor, size)

    def rename(self, path: Path) -> None:
        """Give the complete file, on disk, its final name."""
        with self._errors("written", path):
            os.fsync(self._descriptor)
            self.path.replace(path)
        self.path = path

    def close(self) -> None:
        os.close(self._descriptor)

    def _lock(self) -> None:
        with self._errors("written"):
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._error(f"{self.path}: another process is writing it") from None

    @contextmanager
    def _errors(self, action: str, path: Path | None = None) -> Iterator[None]:
        """The system's errors become this file's, with ``path`` or its own name."""
        try:
            yield
        except OSError as reason:
            name = path or self.path
            raise self._error(f"{name}: cannot be {action} ({reason.strerror})") from None

    def _has_name(self) -> bool:
        """False if the file was renamed or removed before it was locked."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except FileNotFoundError:
            return False


def running_total(total: int, on_progress: ProgressCallback | None) -> Callable[[int], None]:
    """A callback for the size of each part that was read, which reports the sum so far."""
    done = 0

    def on_bytes(size: int) -> None:
        nonlocal done
        done += size
        if on_progress is not None:
            on_progress(done, total)

    return on_bytes
