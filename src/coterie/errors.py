"""The errors of the package. A message says what is wrong, where, and what would work.

Only ``NonFiniteLogitsError`` and ``AnswerTextError`` belong to a request. Any other error
of a forward, an ``OSError`` included, says nothing about the requests, and they can be repeated.
"""

from __future__ import annotations

import json
import re
import reprlib

CLIP_CHARACTERS, WORD_CHARACTERS, MESSAGE_CHARACTERS = 80, 320, 4000
# Everything that a terminal could obey or that reorders text, except newline and tab.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# A quoted text, between quotation marks that are no apostrophes, or a word without a space.
QUOTED_OR_WORD = re.compile(r"""(?<!\w)(['"])((?:(?!\1(?!\w)).)*)\1(?!\w)|\S+""", re.DOTALL)


class JsonRepr(reprlib.Repr):
    """Short representations with the names that JSON has for None, True and False."""

    def repr_NoneType(self, value: None, level: int) -> str:
        return json.dumps(value)

    def repr_bool(self, value: bool, level: int) -> str:
        return json.dumps(value)


_REPR = JsonRepr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, CLIP_CHARACTERS, CLIP_CHARACTERS


class CoterieError(ValueError):
    """Base of all errors that a caller can fix: bad input or an unmet condition, in one line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(shorten(message)))


class ConfigError(CoterieError):
    """A config.json, an option or a combination of options is invalid."""


class CheckpointError(CoterieError):
    """A checkpoint folder or file is missing, truncated, malformed or changed."""


class TokenizerError(CoterieError):
    """A tokenizer, a chat template or a prompt cannot be used."""


class OffloadError(CoterieError):
    """Expert memory, slots, tiers or a fetch cannot be provided."""


class GenerationError(CoterieError):
    """A prompt or a generation cannot run or continue."""


class NonFiniteLogitsError(GenerationError):
    """A forward returned NaN or infinite logits, or router logits.

    ``rows`` are the requests that are the cause, if the engine raises.
    """

    def __init__(self, reason: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(reason)
        self.rows = rows


class AnswerTextError(TokenizerError):
    """The tokenizer cannot decode what the requests ``rows`` generated; they have ended."""

    def __init__(self, reason: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(reason)
        self.rows = rows


class TaskError(CoterieError):
    """A benchmark, its data, its grader or its sandbox cannot be used."""


class SpecError(CoterieError):
    """A ``name:option=value`` text has an unknown name, an unknown option or an invalid value."""


def printable(text: str) -> str:
    """The text with escapes such as ``\\x1b`` in place of control characters."""
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def shorten(message: str) -> str:
    """The message without the middle of quotations, words and texts that are too long to read."""

    def clipped(match: re.Match[str]) -> str:
        mark, quotation = match.groups()
        return clip(match[0], WORD_CHARACTERS) if mark is None else f"{mark}{clip(quotation)}{mark}"

    return QUOTED_OR_WORD.sub(clipped, clip(message, MESSAGE_CHARACTERS))


def clip(text: str, length: int = CLIP_CHARACTERS) -> str:
    """The text, or its start and its end around "..." if it is longer than ``length``."""
    if len(text) <= length:
        return text
    return f"{text[: length - length // 4 - 3]}...{text[-(length // 4) :]}"


def quote(value: object) -> str:
    """The ``repr`` of a value from a JSON file, shortened to fit into a message; None is null."""
    return clip(_REPR.repr(value))
