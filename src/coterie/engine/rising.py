"""Files that have their name only when they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path

from coterie.naming import CoterieError


@contextmanager
def rising(path: Path) -> Iterator[BufferedWriter]:
    """A file that gets its name when it is whole and on the disk, or leaves nothing."""
    part = _part(path)
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


def sweep(path: Path) -> None:
    """Remove what a killed process left of a file that had no name yet."""
    _part(path).unlink(missing_ok=True)


def put(path: Path, content: bytes) -> None:
    with rising(path) as sink:
        sink.write(content)


def put_json(path: Path, content: Mapping[str, object]) -> None:
    put(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
