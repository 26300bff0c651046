"""Token ids in the JSON files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from coterie.errors import ConfigError, quote


def read_token_ids(
    values: Mapping[str, object], key: str, *, file: object, vocab_size: int
) -> tuple[int, ...]:
    """The id or the list of ids under ``key``, in order; empty if absent or null.

    Raises ConfigError for anything but whole numbers within the vocabulary.
    """
    value, ids = values.get(key), []
    for item in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise ConfigError(f"{file}: {key} is {quote(value)}, not a token id")
        if item >= vocab_size:
            problem = f"outside a vocabulary of {vocab_size}"
            raise ConfigError(f"{file}: {key} is {quote(value)}, {problem}")
        ids.append(item)
    return tuple(dict.fromkeys(ids))
