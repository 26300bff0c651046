"""Strict JSON: an object without duplicate keys, or an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

from coterie.errors import CheckpointError


def read_object(file: Path) -> dict[str, object]:
    """The object in a file; raises CheckpointError if there is none."""
    try:
        return parse_object(file.read_bytes(), str(file), "a JSON file")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None


def parse_object(raw: bytes, file: str, kind: str) -> dict[str, object]:
    """The object in ``raw``, a part of ``file``; errors call the file ``kind``."""

    def reject_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{file}: {duplicate} is listed twice")
        return fields

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=reject_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: not {kind} (no valid JSON)") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not {kind} (its JSON is not an object)")
    return value
