"""Errors that name what is wrong, where, and what would work."""

from __future__ import annotations


class CoterieError(ValueError):
    """Bad input or a condition the caller can mend, in one line; the base of all errors here."""


class ConfigError(CoterieError):
    """A config.json, an option or a combination of options that cannot be used."""


class CheckpointError(CoterieError):
    """A checkpoint folder or file that is missing, truncated, misshapen or changed."""


class OffloadError(CoterieError):
    """Expert memory, slots, tiers or a fetch that cannot be provided."""


class GenerationError(CoterieError):
    """A prompt or a generation that cannot run or go on."""


class NonFiniteLogitsError(GenerationError):
    """A forward returned NaN or infinite logits.

    ``rows`` are the requests that shared it. At least one of them is the cause.
    """

    def __init__(self, reason: str, rows: tuple[int, ...] = ()) -> None:
        super().__init__(reason)
        self.rows = rows


class TaskError(CoterieError):
    """A benchmark, its data, its grader or its sandbox that cannot be used."""


class SpecError(CoterieError):
    """A ``name:option=value`` string that names an unknown thing or a value out of range."""
