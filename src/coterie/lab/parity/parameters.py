"""The parameters of a reference run, each read and checked by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coterie.errors import CheckpointError

MIN_CONFIDENCE = 1e-30  # every token passes this threshold


@dataclass(frozen=True)
class ReferenceParameters:
    """A run's parameters, and the names that were read. A name that was never read is an error.

    Each getter raises CheckpointError for a missing or malformed parameter.
    """

    location: str
    values: Mapping[str, object]
    read_names: set[str] = field(default_factory=set)

    def integer(self, name: str, default: int | None = None) -> int:
        return self._typed(name, default, int, "a whole number")

    def number(self, name: str, default: float | None = None) -> float:
        value = self._typed(name, default, (int, float), "a number")
        if not math.isfinite(value):
            raise self._error(name, value, "; it must be finite")
        return float(value)

    def threshold(self, name: str, default: float | None = None) -> float:
        """A confidence threshold, clamped to between ``MIN_CONFIDENCE`` and 1."""
        return min(max(self.number(name, default), MIN_CONFIDENCE), 1.0)

    def allow_only(self, name: str, *supported: object) -> None:
        """Raises for another value, which would change the loop. Absent means the first value."""
        value = self._get(name, supported[0], required=False)
        if value not in supported:
            raise self._error(name, value, f"; supported: {' or '.join(map(repr, supported))}")

    def flag(self, name: str, default: bool) -> bool:
        return self._typed(name, default, bool, "true or false")

    def choice(self, name: str, known: Mapping[str, object], default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self._error(name, value, f"; known: {', '.join(known)}")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids; empty if absent."""
        value = self._get(name, [])
        items = value if isinstance(value, list) else [value]
        ids = tuple(i for i in items if isinstance(i, int) and not isinstance(i, bool))
        if len(ids) < len(items):
            raise self._error(name, value, ", not token ids")
        return ids

    def section(self, name: str) -> ReferenceParameters:
        return ReferenceParameters(
            f"{self.location}: {name}", self._typed(name, {}, dict, "an object")
        )

    def has(self, name: str) -> bool:
        self.read_names.add(name)
        return self.values.get(name) is not None

    def check_unknown_names(self) -> None:
        if unknown := sorted(set(self.values) - self.read_names):
            raise CheckpointError(
                f"{self.location}: unknown parameter {', '.join(map(repr, unknown))}"
            )

    def _typed(self, name: str, default: object, kinds: Any, description: str) -> Any:
        """A parameter of one of these types; a bool is not a number."""
        value = self._get(name, default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise self._error(name, value, f", not {description}")
        return value

    def _get(self, name: str, default: object, *, required: bool = True) -> object:
        self.read_names.add(name)
        value = self.values.get(name)
        value = default if value is None else value
        if value is None and required:
            raise CheckpointError(f"{self.location}: {name} is missing")
        return value

    def _error(self, name: str, value: object, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.location}: {name} is {value!r}{reason}")
