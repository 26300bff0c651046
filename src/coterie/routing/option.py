"""Options of a policy: read from the annotations of its fields, checked, parsed and printed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from coterie.naming import CoterieError

Value = str | int | float | None


@dataclass(frozen=True)
class Within:
    """A range: ``least <= value <= most`` and ``above < value``."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.least <= value <= self.most and self.above < value

    def __str__(self) -> str:
        low = f"above {self.above:g}" if self.above > self.least else f"at least {self.least:g}"
        return low if self.most == math.inf else f"{low} and at most {self.most:g}"


@dataclass(frozen=True)
class Shown:
    """This option is printed even at its default."""


@dataclass(frozen=True)
class Offers:
    """Which options of a shared part a policy offers, and which of them it always prints."""

    names: tuple[str, ...]
    shown: tuple[str, ...] = ()


SHOWN = Shown()


@dataclass(frozen=True)
class Option:
    """One option: where it lives (``part``: the field that holds it, "" = the policy itself)."""

    name: str
    part: str
    kind: type  # int, float or str
    choices: tuple[str, ...]
    within: Within | None
    default: Value | Literal["required"]
    shown: bool

    def read(self, text: str) -> Value:
        """The value that ``text`` spells, not yet checked."""
        try:
            return self.kind(text)
        except ValueError:
            noun = {int: "a whole number", float: "a number"}[self.kind]
            raise CoterieError(f"{self.name} must be {noun}, not {text!r}") from None

    def check(self, value: Value) -> None:
        """Raises unless ``value`` is one that this option can take."""
        if value is None and self.default is None:
            return
        if self.choices and value not in self.choices:
            raise CoterieError(
                f"{self.name} must be one of {', '.join(self.choices)}, not {value!r}"
            )
        if self.kind is not str and (
            isinstance(value, bool) or not isinstance(value, int | self.kind)
        ):
            raise CoterieError(f"{self.name} must be of type {self.kind.__name__}, not {value!r}")
        if self.within is not None and isinstance(value, int | float) and value not in self.within:
            raise CoterieError(f"{self.name} must be {self.within}, not {value!r}")


def options(cls: type) -> dict[str, Option]:
    """Every option of a policy class, in the order of its spelling."""
    found = {}
    for field, hint, notes in _fields(cls):
        offers = next((note for note in notes if isinstance(note, Offers)), None)
        if offers is None:
            found[field.name] = _option(field, hint, notes)
            continue
        for inner, inner_hint, inner_notes in _fields(type(field.default)):
            if inner.name in offers.names:
                found[inner.name] = _option(
                    inner,
                    inner_hint,
                    (*inner_notes, *([SHOWN] if inner.name in offers.shown else [])),
                    part=field.name,
                    default=getattr(field.default, inner.name),
                )
    return found


def check_options(value: object) -> None:
    """Raises for a field that its annotation forbids; a dataclass's ``__post_init__``."""
    for field, hint, notes in _fields(type(value)):
        if not is_dataclass(hint):
            _option(field, hint, notes).check(getattr(value, field.name))


def _fields(cls: type) -> Iterator[tuple[Field[object], type, tuple[object, ...]]]:
    """(field, plain type or Literal, notes of its ``Annotated``) of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        hint, notes = hints[field.name], ()
        if get_origin(hint) in (Union, UnionType):
            hint = next(arm for arm in get_args(hint) if arm is not NoneType)
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
        yield field, hint, tuple(notes)


def _option(
    field: Field[object],
    hint: type,
    notes: tuple[object, ...],
    *,
    part: str = "",
    default: Value | Literal["required"] = "required",
) -> Option:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if part == "" and field.default is not MISSING:
        default = field.default  # pyright: ignore[reportAssignmentType]
    return Option(
        name=field.name,
        part=part,
        kind=str if choices else hint,
        choices=choices,
        within=next((note for note in notes if isinstance(note, Within)), None),
        default=default,
        shown=SHOWN in notes,
    )
