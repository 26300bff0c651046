"""Text form of a choice and its options, ``name:option=value,option=value``, and back.

A choice is a frozen dataclass. The annotation of each field defines one option and its valid
values: ``UnitFraction``, ``bool``, ``Literal["all", "masked"]``, ``PositiveInt | None``, or
``PositiveInt | Literal["slots"]`` for a number or that word.

``X | tuple[X, ...]`` also takes a list: ``beta=0.3/0.2/0.25`` is (0.3, 0.2, 0.25). A list has at
least two entries and ``beta=0.3`` is the number, so every value has one text.

``Annotated[X, Key("resident_bonus", "lam")]`` prints the option as ``resident_bonus`` and also
reads ``lam``. ``Annotated[X, ValueAlias("masked", "topk-prob")]`` also reads the value ``masked``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from coterie.errors import CoterieError, SpecError
from coterie.keys import Key
from coterie.strict_json import MAX_BITS

ScalarValue = str | int | float
OptionValue = ScalarValue | tuple[ScalarValue, ...] | None
SpecT = TypeVar("SpecT")
NoteT = TypeVar("NoteT")


@dataclass(frozen=True)
class Bounds:
    """The range ``ge <= value <= le`` and ``gt < value < lt``, without NaN and infinity."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.ge <= value <= self.le and self.gt < value < self.lt and abs(value) < math.inf

    def __str__(self) -> str:
        bounds = {"above": self.gt, "at least": self.ge, "at most": self.le, "below": self.lt}
        parts = [f"{word} {bound:g}" for word, bound in bounds.items() if abs(bound) < math.inf]
        return " and ".join(parts) or "finite"


PositiveFraction = Annotated[float, Bounds(gt=0, le=1)]
UnitFraction = Annotated[float, Bounds(ge=0, le=1)]
PositiveInt = Annotated[int, Bounds(ge=1)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
PositiveFractions = PositiveFraction | tuple[PositiveFraction, ...]  # one, or one for each layer

LIST_SEPARATOR = "/"
ALWAYS_PRINTED = object()  # an annotation: the option is printed even at its default
ACCEPTS_LIST = object()  # stands for ``tuple[X, ...]`` in an annotation


@dataclass(frozen=True)
class NestedOptions:
    """An annotation: these options of the field's own dataclass are options of the outer one."""

    names: tuple[str, ...]
    always_printed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ValueAlias:
    """An annotation: the text ``alias`` is read as ``value``."""

    alias: str
    value: str


@dataclass(frozen=True)
class Option:
    """One option of a spec."""

    name: str  # as printed
    aliases: tuple[str, ...]  # other names that are read as this one
    attribute: str  # the field that holds the value
    parent_field: (
        str  # the field with the dataclass that has that attribute; "" for the spec itself
    )
    value_type: type  # int, float or bool; str if only words are valid
    bounds: Bounds
    words: tuple[str, ...]  # valid words; with a number type, in addition to numbers
    value_aliases: tuple[ValueAlias, ...]
    default: OptionValue | Literal["required"]
    always_printed: bool
    accepts_list: bool

    def __str__(self) -> str:
        """The valid values: "at least 1 | slots"."""
        number = () if self.value_type is str else (str(self.bounds),)
        return " | ".join((*number, *self.words))

    def value_of(self, spec: object) -> OptionValue:
        """The value of this option in ``spec``."""
        owner = getattr(spec, self.parent_field) if self.parent_field else spec
        return getattr(owner, self.attribute)

    def parse(self, text: str) -> OptionValue:
        """The value that ``text`` stands for; its range is not checked yet."""
        entries = text.split(LIST_SEPARATOR) if self.accepts_list else [text]
        values = [
            self._parse_scalar(entry.strip(), label)
            for entry, label in zip(entries, self._labels(entries), strict=True)
        ]
        return tuple(values) if len(values) > 1 else values[0]

    def resolve_alias(self, text: str) -> str:
        """The value that ``text`` is an alias of, or ``text`` itself."""
        return next((entry.value for entry in self.value_aliases if entry.alias == text), text)

    def check(self, value: OptionValue) -> None:
        """Raises SpecError for an invalid value; names the invalid entry of a list."""
        if value is None and self.default is None:
            return
        if not (self.accepts_list and isinstance(value, tuple)):
            self._check_scalar(value, self.name)
            return
        if len(value) < 2:
            raise SpecError(f"{self.name} as a list needs two entries or more, not {value!r}")
        for entry, label in zip(value, self._labels(value), strict=True):
            self._check_scalar(entry, label)

    def _labels(self, entries: Sequence[ScalarValue]) -> list[str]:
        """The name of each entry in an error: "beta", or "entry 2 of 4 of beta"."""
        count = len(entries)
        if count == 1:
            return [self.name]
        return [f"entry {index} of {count} of {self.name}" for index in range(1, count + 1)]

    def _parse_scalar(self, text: str, label: str) -> ScalarValue:
        if not text:
            raise SpecError(f"{label} is empty")
        text = self.resolve_alias(text)
        if self.value_type is str or text in self.words:
            return text
        noun, convert = PARSERS[self.value_type]
        try:
            return convert(text)
        except (ValueError, KeyError):
            valid = " or ".join((noun, *self.words))
            raise SpecError(f"{label} must be {valid}, not {text!r}") from None

    def _check_scalar(self, value: OptionValue, label: str) -> None:
        if value in self.words:
            return
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise SpecError(f"{label} must have at most 100 digits")
        if self.words and self.value_type is str:
            raise SpecError(f"{label} must be one of {', '.join(self.words)}, not {value!r}")
        accepted = (int, float) if self.value_type is float else self.value_type
        if isinstance(value, bool) != (self.value_type is bool) or not isinstance(value, accepted):
            list_hint = " or a tuple of it" if self.accepts_list and label == self.name else ""
            raise SpecError(
                f"{label} must be of type {self.value_type.__name__}{list_hint}, not {value!r}"
            )
        if isinstance(value, int | float) and value not in self.bounds:
            raise SpecError(f"{label} must be {self.bounds}, not {value!r}")


def parse_spec(text: str, table: Mapping[str, type[SpecT]], noun: str) -> SpecT:
    """An instance of one of the classes in ``table``, from its text.

    Raises SpecError that names the ``noun`` ("policy") and the valid names, options or values.
    """
    name, _, rest = text.strip().partition(":")
    if name not in table:
        raise unknown_name(name, table, noun)
    options = spec_options(table[name])
    try:
        values = {option: option.parse(value) for option, value in _parse_pairs(rest, options)}
        missing = [
            option.name
            for option in options.values()
            if option.default == "required" and option not in values
        ]
        if missing:
            raise SpecError(f"needs {', '.join(missing)}")
        return _build(table[name], values)
    except CoterieError as error:
        raise SpecError(f"{noun} {text!r}: {error}") from None


def unknown_name(name: str, table: Iterable[str], noun: str) -> SpecError:
    """The error for a name that is not in the table: it has the names, and the most similar."""
    similar = get_close_matches(name.lower().replace("_", "-"), table, 1)
    suggestion = f"; did you mean {similar[0]!r}?" if similar else ""
    return SpecError(f"unknown {noun} {name!r}; known: {', '.join(sorted(table))}{suggestion}")


def format_spec(spec: object, table: Mapping[str, type[object]]) -> str:
    """The text that ``parse_spec`` reads back as ``spec``, without options at their defaults."""
    name = next((name for name, cls in table.items() if type(spec) is cls), None)
    if name is None:
        raise SpecError(f"{spec!r} has no name; known: {', '.join(sorted(table))}")
    values = {option: option.value_of(spec) for option in spec_options(type(spec)).values()}
    parts = [
        f"{option.name}={_format_value(value)}"
        for option, value in values.items()
        if value is not None and (option.always_printed or value != option.default)
    ]
    return f"{name}:{','.join(parts)}" if parts else name


def update_spec_text(text: str, table: Mapping[str, type[object]]) -> str:
    """The same text with the current names of options and values.

    Everything else stays: order, numbers, options at their defaults, and parts that are not valid.
    """
    name, colon, rest = text.partition(":")
    if name not in table or not colon:
        return text
    options = spec_options(table[name])
    items = []
    for item in rest.split(","):
        key, equals, value = item.partition("=")
        option = _find_option(key.strip(), options)
        if equals and option is not None:
            key, value = option.name, option.resolve_alias(value.strip())
        items.append(f"{key}{equals}{value}")
    return f"{name}:{','.join(items)}"


@cache
def spec_options(cls: type) -> Mapping[str, Option]:
    """Every option of a class by name, in the order in which they are printed."""
    hints = get_type_hints(cls, include_extras=True)
    options = []
    for field in fields(cls):
        notes = tuple(_flatten(hints[field.name]))
        nested = _first(notes, NestedOptions)
        options += [_make_option(field, notes)] if nested is None else _nested(field, nested)
    return {option.name: option for option in options}


def check_options(value: object) -> None:
    """Raises SpecError for a field with an invalid value; used as ``__post_init__``."""
    for option in spec_options(type(value)).values():
        if not option.parent_field:
            option.check(option.value_of(value))


def _flatten(hint: object) -> Iterator[object]:
    """The types, Literals and notes that an annotation consists of, without None."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from _flatten(arguments[0])
        yield from arguments[1:]
    elif origin in (Union, UnionType):
        for member in arguments:
            yield from _flatten(member)
    elif origin is tuple:
        yield ACCEPTS_LIST
    elif hint is not NoneType:
        yield hint


def _first(notes: Sequence[object], cls: type[NoteT]) -> NoteT | None:
    return next((note for note in notes if isinstance(note, cls)), None)


def _make_option(field: Field[object], notes: Sequence[object]) -> Option:
    key = _first(notes, Key) or Key(field.name)
    return Option(
        name=key.name,
        aliases=key.aliases,
        attribute=field.name,
        parent_field="",
        value_type=_first(notes, type) or str,
        bounds=_first(notes, Bounds) or Bounds(),
        words=tuple(
            word for note in notes if get_origin(note) is Literal for word in get_args(note)
        ),
        value_aliases=tuple(note for note in notes if isinstance(note, ValueAlias)),
        default="required" if field.default is MISSING else field.default,  # pyright: ignore[reportArgumentType]
        always_printed=ALWAYS_PRINTED in notes,
        accepts_list=ACCEPTS_LIST in notes,
    )


def _nested(field: Field[object], nested: NestedOptions) -> list[Option]:
    """The options of the field's dataclass that ``nested`` names."""
    return [
        replace(
            option,
            parent_field=field.name,
            default=option.value_of(field.default),
            always_printed=option.name in nested.always_printed,
        )
        for option in spec_options(type(field.default)).values()
        if option.name in nested.names
    ]


def _parse_pairs(rest: str, options: Mapping[str, Option]) -> list[tuple[Option, str]]:
    pairs: dict[str, tuple[Option, str]] = {}
    for item in rest.split(",") if rest.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise SpecError(f"{item.strip()!r} is not of the form option=value")
        option = _find_option(key, options)
        if option is None:
            raise SpecError(f"unknown option {key!r}; it has: {', '.join(options) or 'none'}")
        if option.name in pairs:
            raise SpecError(f"{option.name} is given twice")
        pairs[option.name] = option, value
    return list(pairs.values())


def _find_option(name: str, options: Mapping[str, Option]) -> Option | None:
    by_alias = (option for option in options.values() if name in option.aliases)
    return options.get(name) or next(by_alias, None)


def _build(cls: type[SpecT], values: Mapping[Option, OptionValue]) -> SpecT:
    """An instance of ``cls``; nested options change the default of their field."""
    arguments: dict[str, dict[str, OptionValue]] = {}
    for option, value in values.items():
        arguments.setdefault(option.parent_field, {})[option.attribute] = value
    own = arguments.pop("", {})
    nested = {name: replace(getattr(cls, name), **inner) for name, inner in arguments.items()}
    return cls(**own, **nested)


def _format_value(value: OptionValue) -> str:
    """The shortest text that reads back as the same value: 1 for 1.0."""
    if isinstance(value, tuple):
        return LIST_SEPARATOR.join(map(_format_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


PARSERS: dict[type, tuple[str, Callable[[str], ScalarValue]]] = {  # noun in errors, parser
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("yes or no", {"yes": True, "no": False}.__getitem__),
}
