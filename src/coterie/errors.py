"""The errors of the package. A message says what is wrong, where, and what would work.

Only ``NonFiniteLogitsError`` belongs to a request: the model has no answer to it. Any other error
of a forward, an ``OSError`` included, says nothing about the requests, and they can be repeated.
"""

from __future__ import annotations


class CoterieError(ValueError):
    """Base of all errors that a caller can fix: bad input or an unmet condition, in one line."""


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

    ``rows`` are the requests that shared the forward, if the engine raises: at least one of them is
    the cause.
    """

    def __init__(self, reason: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(reason)
        self.rows = rows


class TaskError(CoterieError):
    """A benchmark, its data, its grader or its sandbox cannot be used."""


class SpecError(CoterieError):
    """A ``name:option=value`` text has an unknown name, an unknown option or an invalid value."""
