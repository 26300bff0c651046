"""JSON that means one thing: a key listed twice is an error, as is anything but an object."""

from __future__ import annotations

import json
from pathlib import Path

from coterie.errors import CoterieError


def read_object(file: Path) -> dict[str, object]:
    """The object in a file; CoterieError names the file where there is none."""
    try:
        return parse_object(file.read_bytes(), str(file), "a JSON file")
    except OSError as error:
        raise CoterieError(f"{file}: cannot be read ({error.strerror})") from None


def parse_object(raw: bytes, file: str, kind: str) -> dict[str, object]:
    """The object in ``raw``, which should be part of ``file``, of this kind."""

    def reject_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise CoterieError(f"{file}: {duplicate} is listed twice")
        return fields

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=reject_duplicates)
    except CoterieError:
        raise
    except (ValueError, RecursionError):
        raise CoterieError(f"{file}: not {kind} (no JSON can be read in it)") from None
    if not isinstance(value, dict):
        raise CoterieError(f"{file}: not {kind} (its JSON is no object)")
    return value
