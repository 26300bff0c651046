"""The journal of a long command's finished steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from coterie.errors import ConfigError
from coterie.files import LockedFile


class Journal:
    """The finished steps of a long command by name, one JSON line each, in a locked file.

    The same command reads them again. ``identity`` is what all steps depend on.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, object]) -> None:
        """Without a path, steps stay in memory. Raises ConfigError for a file in use or of another
        identity."""
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
