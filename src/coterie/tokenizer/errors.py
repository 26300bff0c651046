"""The one error of this room; it stands alone because the room imports nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path


class TokenizerError(ValueError):
    """An unusable tokenizer, template or prompt: one line that names the file or the token."""


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object in ``path``; raises TextError naming the file where it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
