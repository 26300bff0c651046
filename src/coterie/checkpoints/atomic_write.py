"""Files that have their name only when they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path

from coterie.errors import CoterieError


@contextmanager
def atomic_writer(path: Path) -> Iterator[BufferedWriter]:
    """A file that gets its name when it is whole and on the disk, or leaves nothing."""
    part = _partial_path(path)
    try:
        with part.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(part, path)
    except OSError as error:
        raise CoterieError(
            f"{path}: cannot be written ({error.strerror}); "
            "what is finished stays, and the same command goes on with it"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def remove_partial(path: Path) -> None:
    """Remove what a killed process left of a file that had no name yet."""
    _partial_path(path).unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes) -> None:
    with atomic_writer(path) as sink:
        sink.write(content)


def atomic_write_json(path: Path, content: Mapping[str, object]) -> None:
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")
