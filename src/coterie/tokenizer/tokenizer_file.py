"""A ``tokenizer.json``, checked before the library reads it.

The library ends the process where it cannot allocate memory, which a damaged file can bring about.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

from coterie.errors import TokenizerError
from coterie.files import MIB, read_errors, read_file
from coterie.strict_json import parse_object

FILE_LIMIT = 256 * MIB
MAX_GROWTH = 16  # characters that a normalizer may put in place of one
FIXED_LENGTH_KEYS = ("truncation", "padding")
"""Settings of the training; they would cut a prompt, or fill it up, without a word."""


def read_tokenizer_json(path: Path) -> str:
    """The content without truncation and padding. Raises CoterieError for a damaged file."""
    raw, growth = read_file(path, FILE_LIMIT), 1
    with read_errors(path):
        content = parse_object(raw, "a tokenizer")
    for part in _parts(content.get("normalizer")):
        if part.get("type") == "Precompiled" and not _is_character_map(part):
            raise TokenizerError(f"{path}: the character map of its normalizer is damaged")
        growth *= max(1, len(str(part.get("content", ""))))
    if growth > MAX_GROWTH:
        raise TokenizerError(f"{path}: its normalizer makes a text {growth:,} times as long")
    if all(content.get(key) is None for key in FIXED_LENGTH_KEYS):
        return raw.decode("utf-8-sig")
    return json.dumps(content | dict.fromkeys(FIXED_LENGTH_KEYS), ensure_ascii=False)


def _parts(value: object) -> Iterator[dict[str, object]]:
    """A normalizer and all those inside it."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _parts(inner)


def _is_character_map(normalizer: dict[str, object]) -> bool:
    """Whether the bytes are the size of a table, the table, and text."""
    try:
        raw = base64.b64decode(str(normalizer.get("precompiled_charsmap")), validate=True)
        size = int.from_bytes(raw[:4], "little")
        raw[4 + size :].decode("utf-8")
    except ValueError:
        return False
    return 4 <= size <= len(raw) - 4 and size % 4 == 0
