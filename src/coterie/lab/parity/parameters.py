"""The parameters that a reference run states, asked for one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from coterie.errors import CoterieError

MIN_CONFIDENCE = 1e-30
"""A confidence that everything passes."""


@dataclass(frozen=True)
class ReferenceParameters:
    """A run's parameters and which were asked for; one that nobody asks for is an error."""

    location: str
    values: Mapping[str, object]
    read_names: set[str] = field(default_factory=set)  # grows while a loop is told

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CoterieError(f"{self.location}: {name} is {value!r}, not a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CoterieError(f"{self.location}: {name} is {value!r}, not a number")
        if not math.isfinite(value):
            raise CoterieError(f"{self.location}: {name} is {value!r}; it must be finite")
        return float(value)

    def threshold(self, name: str, default: float | None = None) -> float:
        """A confidence to pass; below 0 it bars nothing, above 1 everything, as the ends do."""
        return min(max(self.number(name, default), MIN_CONFIDENCE), 1.0)

    def allow_only(self, name: str, *supported: object) -> None:
        """Absent, or one of these: another would be another loop."""
        value = self._get(name, supported[0], required=False)
        if value not in supported:
            known = " or ".join(map(repr, supported))
            raise CoterieError(f"{self.location}: {name} is {value!r}; supported: {known}")

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise CoterieError(f"{self.location}: {name} is {value!r}, not true or false")
        return value

    def choice(self, name: str, known: Mapping[str, object], default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in known:
            raise CoterieError(f"{self.location}: {name} is {value!r}; known: {', '.join(known)}")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Empty where absent."""
        value = self._get(name, [])
        items = value if isinstance(value, list) else [value]
        ids = tuple(i for i in items if isinstance(i, int) and not isinstance(i, bool))
        if len(ids) < len(items):
            raise CoterieError(f"{self.location}: {name} is {value!r}, not token ids")
        return ids

    def section(self, name: str) -> ReferenceParameters:
        value = self._get(name, {})
        if not isinstance(value, dict):
            raise CoterieError(f"{self.location}: {name} is {value!r}, not an object")
        return ReferenceParameters(f"{self.location}: {name}", value)

    def has(self, name: str) -> bool:
        self.read_names.add(name)
        return self.values.get(name) is not None

    def check_unknown_names(self) -> None:
        if unknown := sorted(set(self.values) - self.read_names):
            raise CoterieError(
                f"{self.location}: unknown parameter {', '.join(map(repr, unknown))}"
            )

    def _get(self, name: str, default: object, *, required: bool = True) -> object:
        self.read_names.add(name)
        value = self.values.get(name)
        value = default if value is None else value
        if value is None and required:
            raise CoterieError(f"{self.location}: {name} is missing")
        return value
