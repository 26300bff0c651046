"""One spelling for a choice and its options: ``name:option=value,option=value``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Protocol, TypeVar, get_type_hints

from coterie.naming import CoterieError


class Spelled(Protocol):
    """A frozen dataclass of numbers and words."""

    __dataclass_fields__: dict[str, object]


S = TypeVar("S")


@dataclass(frozen=True)
class Range:
    """``low <= value <= high``; ``open_low`` leaves ``low`` itself out."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False

    def check(self, name: str, value: float) -> None:
        inside = self.low < value if self.open_low else self.low <= value
        if not (inside and value <= self.high and math.isfinite(value)):
            raise CoterieError(f"{name} must lie in {self}, not {value!r}")

    def __str__(self) -> str:
        left = "(" if self.open_low or self.low == float("-inf") else "["
        right = ")" if self.high == float("inf") else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


SHARE = Range(0.0, 1.0, open_low=True)
UNIT = Range(0.0, 1.0)
COUNT = Range(0)
POSITIVE = Range(1)


def parse(text: str, table: Mapping[str, type[S]], noun: str) -> S:
    """The value that ``text`` spells, of one of the classes in ``table``."""
    name, _, tail = text.strip().partition(":")
    if name not in table:
        raise CoterieError(f"unknown {noun} {name!r}; known: {', '.join(sorted(table))}")
    cls = table[name]
    hints = get_type_hints(cls)
    given: dict[str, int | float | str] = {}
    for part in tail.split(",") if tail else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in hints:
            known = ", ".join(hints) or "none"
            raise CoterieError(f"unknown option {part!r} of {noun} {name!r}; known: {known}")
        if key in given:
            raise CoterieError(f"{key} is given twice in {text!r}")
        given[key] = _read(hints[key], value, f"{name}:{key}")
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]  # pyright: ignore[reportArgumentType]
    if missing:
        raise CoterieError(f"{noun} {name!r} needs {', '.join(missing)}")
    return cls(**given)


def spell(value: object, table: Mapping[str, type[S]]) -> str:
    """The text that ``parse`` reads back; options at their default are left out."""
    name = next(name for name, cls in table.items() if cls is type(value))
    told = [
        f"{field.name}={_write(getattr(value, field.name))}"
        for field in fields(value)  # pyright: ignore[reportArgumentType]
        if getattr(value, field.name) != field.default
    ]
    return f"{name}:{','.join(told)}" if told else name


def _read(hint: type, text: str, where: str) -> int | float | str:
    if hint is bool:
        if text not in ("yes", "no"):
            raise CoterieError(f"{where} must be yes or no, not {text!r}")
        return text == "yes"
    if hint not in (int, float):
        return text
    try:
        return int(text) if hint is int else float(text)
    except ValueError:
        noun = "a whole number" if hint is int else "a number"
        raise CoterieError(f"{where} must be {noun}, not {text!r}") from None


def _write(value: float | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
