"""The one error of this room; it stands alone because the room imports nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path


class TextError(ValueError):
    """An unusable tokenizer, template or prompt: one line that names the file or the token."""


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in ``path``; raises TextError naming the file where it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TextError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(found, dict):
        raise TextError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
