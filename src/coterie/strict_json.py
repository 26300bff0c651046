"""Strict JSON: an object without duplicate keys, or an error that names the file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from coterie.errors import CheckpointError, CoterieError, clip
from coterie.files import MIB, read_errors, read_file

SMALL_FILE, LISTING_FILE = 16 * MIB, 64 * MIB
"""Upper limits of a config, and of a file that lists tensors."""

MAX_DEPTH, MAX_BITS = 48, 333
TOO_MANY_DIGITS = "a number in it has more than 100 digits"


def read_object(file: Path, limit: int = SMALL_FILE) -> dict[str, object]:
    """The object in a regular file of at most ``limit`` bytes; raises CheckpointError otherwise."""
    content = read_file(file, limit)
    with read_errors(file):
        return parse_object(content, "a JSON file")


def parse_object(raw: bytes, kind: str) -> dict[str, object]:
    """The object in ``raw``, a part of a file; errors call the file ``kind``.

    A byte order mark before it is ignored.

    Raises CheckpointError for keys listed twice, deep nesting and endless numbers too: what is
    returned can be compared, converted and shown.
    """
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise CheckpointError(f"not {kind} (no valid JSON at {place}: {error.msg})") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CheckpointError(f"not {kind} (no valid JSON: line {line} is not UTF-8)") from None
    except RecursionError:
        raise CheckpointError(f"not {kind} (no valid JSON: nested too deeply)") from None
    except CoterieError:
        raise
    except ValueError:  # Python's own limit, thousands of digits
        raise CheckpointError(TOO_MANY_DIGITS) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"not {kind} (its JSON is not an object)")
    _check_values(value, MAX_DEPTH)
    return value


def describe_json_error(error: ValueError | RecursionError) -> str:
    """What is wrong with a text that ``json.loads`` refuses, without Python's own advice."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error) if isinstance(error, json.JSONDecodeError) else TOO_MANY_DIGITS


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise CheckpointError(f"{clip(name)} is listed twice")
    return fields


def _check_values(value: dict[str, object] | list[object], depth: int) -> None:
    """Raises CheckpointError for deep nesting and for numbers too long to be shown."""
    if depth == 0:
        raise CheckpointError(f"its JSON is nested more than {MAX_DEPTH} deep")
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict | list):
            _check_values(item, depth - 1)
        elif isinstance(item, int) and item.bit_length() > MAX_BITS:
            raise CheckpointError(TOO_MANY_DIGITS)
