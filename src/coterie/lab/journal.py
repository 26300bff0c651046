"""Files of long commands: locked while they are written, and a journal of finished steps."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from coterie.errors import ConfigError


class LockedFile:
    """A file to append to that no other process can open in the same way."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file cannot be written, or another process writes it."""
        self.path = path
        while True:
            try:
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise ConfigError(f"{path}: another process is writing it") from None
            except OSError as error:
                raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
            if self._has_name():
                return
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> bytes:
        return os.pread(self._descriptor, self.size, 0)

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def append(self, content: bytes, *, sync: bool = False) -> None:
        """Write all bytes; if that fails, the file ends as before. Raises ConfigError."""
        end = self.size
        try:
            while content:
                content = content[os.write(self._descriptor, content) :]
            if sync:
                os.fsync(self._descriptor)
        except OSError as error:
            self.truncate(end)
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from None

    def truncate(self, size: int = 0) -> None:
        os.ftruncate(self._descriptor, size)

    def rename(self, path: Path) -> None:
        """Give the complete file, on disk, its final name."""
        try:
            os.fsync(self._descriptor)
            self.path.replace(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
        self.path = path

    def close(self) -> None:
        os.close(self._descriptor)

    def _has_name(self) -> bool:
        """False if the file was renamed or removed before it was locked."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except FileNotFoundError:
            return False


class Journal:
    """The finished steps of a long command by name, one JSON line each, in a locked file.

    The same command reads them again. ``identity`` is what all steps depend on.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, object]) -> None:
        """None: in memory only. Raises ConfigError for a file in use or of another identity."""
        self.steps: dict[str, Any] = {}
        self._file = None if path is None else LockedFile(path)
        if self._file is not None:
            try:
                self._resume(self._file, json.loads(json.dumps(identity)))
            except BaseException:
                self._file.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """An unfinished journal stays, if it has a step."""
        if self._file is not None:
            if not self.steps:
                self._file.path.unlink(missing_ok=True)
            self._file.close()

    @property
    def path(self) -> Path | None:
        return None if self._file is None else self._file.path

    def add(self, name: str, value: object) -> None:
        """The step is on disk when this returns."""
        if self._file is not None:
            self._file.append(_encode_line([name, value]), sync=True)
        self.steps[name] = value

    def remove(self) -> None:
        """The command is complete."""
        if self._file is not None:
            self._file.path.unlink(missing_ok=True)

    def _resume(self, file: LockedFile, identity: object) -> None:
        """Read the complete lines; one that a killed process or a power cut left is dropped."""
        lines = file.read().split(b"\n")
        complete = lines[:-1]
        if complete and _decode_line(complete[-1]) is None:
            complete.pop()
        file.truncate(sum(len(line) + 1 for line in complete))
        if not complete:
            file.append(_encode_line(["identity", identity]), sync=True)
            return
        steps = [_decode_line(line) for line in complete]
        if None in steps:
            number = steps.index(None) + 1
            raise ConfigError(f"{file.path}: line {number} is damaged; remove the file")
        (_, stored), *rest = (step for step in steps if step is not None)
        if stored != identity:
            changed = ", ".join(_differing_keys(stored, identity))
            raise ConfigError(
                f"{file.path}: holds the measurements of another run ({changed} differ); "
                "remove it or choose another output"
            )
        self.steps |= dict(rest)


def _encode_line(step: list[object]) -> bytes:
    return json.dumps(step).encode() + b"\n"


def _decode_line(line: bytes) -> tuple[str, Any] | None:
    try:
        step = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(step, list) or len(step) != 2 or not isinstance(step[0], str):
        return None
    return step[0], step[1]


def _differing_keys(stored: object, expected: object) -> list[str]:
    if not isinstance(stored, dict) or not isinstance(expected, dict):
        return ["identity"]
    return [key for key in {**stored, **expected} if stored.get(key) != expected.get(key)]
