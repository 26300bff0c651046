"""Strict JSON: an object without duplicate keys, or an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

from coterie.errors import CheckpointError, clip
from coterie.files import MIB, read_errors, read_file

SMALL_FILE, LISTING_FILE = 16 * MIB, 64 * MIB
"""Upper limits of a config, and of a file that lists tensors."""

MAX_DEPTH, MAX_DIGITS = 48, 100


def read_object(file: Path, limit: int = SMALL_FILE) -> dict[str, object]:
    """The object in a regular file of at most ``limit`` bytes; raises CheckpointError otherwise."""
    content = read_file(file, limit)
    with read_errors(file):
        return parse_object(content, "a JSON file")


def parse_object(raw: bytes, kind: str) -> dict[str, object]:
    """The object in ``raw``, a part of a file; errors call the file ``kind``.

    Raises CheckpointError for keys listed twice, deep nesting and endless numbers too: what is
    returned can be compared, converted and shown.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise CheckpointError(f"not {kind} (no valid JSON at {place}: {error.msg})") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CheckpointError(f"not {kind} (no valid JSON: line {line} is not UTF-8)") from None
    except RecursionError:
        raise CheckpointError(f"not {kind} (no valid JSON: nested too deeply)") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"not {kind} (its JSON is not an object)")
    if _is_deeper(value, MAX_DEPTH):
        raise CheckpointError(f"not {kind} (its JSON is nested more than {MAX_DEPTH} deep)")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for name, value in pairs:
        if name in fields:
            raise CheckpointError(f"{clip(name)} is listed twice")
        fields[name] = value
    return fields


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise CheckpointError(f"a number in it has {len(digits)} digits")
    return int(digits)


def _is_deeper(value: object, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(item, depth - 1) for item in inner)
