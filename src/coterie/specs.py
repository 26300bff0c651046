"""One spelling for a choice and its options: ``name:option=value,option=value``.

A choice is a frozen dataclass of numbers and words; the annotations of its fields say what each may
be (``Share``, ``Literal["all", "masked"]``, ``bool``, ``Count | None``, ``Count |
Literal["slots"]``: a number or that word). From them come the options
with their checks, and the text both ways.

An option annotated ``Shares``, or ``X | tuple[X, ...]`` for any other X, also takes a list:
``beta=0.3/0.2/0.25`` is the tuple (0.3, 0.2, 0.25). One number stays a number, ``beta=0.3`` is 0.3,
so a tuple holds at least two entries and every value has one spelling.

An option has the name of its field, or the one of its ``Key``: ``Annotated[Amount,
Key("resident_bonus", "lam")]`` is printed as resident_bonus, and lam is read too. ``Spelt("masked",
"topk-prob")`` prints the value "masked" as topk-prob and reads both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from coterie.errors import CoterieError
from coterie.keys import Key

ScalarValue = str | int | float
OptionValue = ScalarValue | tuple[ScalarValue, ...] | None
SpecT = TypeVar("SpecT")


@dataclass(frozen=True)
class Bounds:
    """A range: ``least <= value <= most`` and ``above < value < below``; never NaN or infinite."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def __contains__(self, value: float) -> bool:
        in_bounds = self.ge <= value <= self.le and self.gt < value < self.lt
        return in_bounds and -math.inf < value < math.inf

    def __str__(self) -> str:
        bounds = {"above": self.gt, "at least": self.ge}
        bounds |= {"at most": self.le, "below": self.lt}
        parts = [f"{word} {bound:g}" for word, bound in bounds.items() if abs(bound) < math.inf]
        return " and ".join(parts) or "finite"


PositiveFraction = Annotated[float, Bounds(gt=0, le=1)]  # something of a whole
UnitFraction = Annotated[float, Bounds(ge=0, le=1)]  # perhaps nothing of it
PositiveInt = Annotated[int, Bounds(ge=1)]
NonNegativeInt = Annotated[int, Bounds(ge=0)]  # a count that may be none
NonNegativeFloat = Annotated[float, Bounds(ge=0)]
PositiveFractions = (
    PositiveFraction | tuple[PositiveFraction, ...]
)  # one for all, or one each: 0.3/0.2/0.25

LIST_SEPARATOR = "/"  # the entries of a list


@dataclass(frozen=True)
class AlwaysPrinted:
    """This option is printed even at its default."""


@dataclass(frozen=True)
class NestedOptions:
    """Which options of a part a choice offers, by name, and which of them it always prints."""

    names: tuple[str, ...]
    always_printed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ValueAlias:
    """The word that a value is printed as; it is read as this word and as itself."""

    value: str
    printed: str

    def of(self, value: str) -> str:
        """The word of this value; any other value is its own."""
        return self.printed if value == self.value else value


ALWAYS_PRINTED = AlwaysPrinted()
ACCEPTS_LIST = object()  # a note: this option also takes a list


@dataclass(frozen=True)
class Option:
    """One option: where it lives (``part``: the field that holds it, "" = the choice itself)."""

    name: str  # as it is printed
    attribute: str  # the field that holds its value
    parent_field: str
    value_type: type  # int, float, bool or str; of each entry, where it takes a list
    choices: tuple[str, ...]
    bounds: Bounds
    default: OptionValue | Literal["required"]
    always_printed: bool
    accepts_list: bool = False  # it also takes a list, as a tuple of at least two entries
    keywords: tuple[str, ...] = ()  # which it takes beside numbers
    also: tuple[str, ...] = ()  # names that are read as this one
    spelt: tuple[ValueAlias, ...] = ()  # values that are printed as another word

    def parse_value(self, text: str) -> OptionValue:
        """The value that ``text`` spells, its range not yet checked."""
        entries = (
            [entry.strip() for entry in text.split(LIST_SEPARATOR)] if self.accepts_list else [text]
        )
        first, *rest = [
            self._parse_scalar(entry, label) for entry, label in self._labelled(entries)
        ]
        return (first, *rest) if rest else first

    def check(self, value: OptionValue) -> None:
        """Raises unless ``value`` is one that this option can take; names the entry of a list."""
        if value is None and self.default is None:
            return
        if not (self.accepts_list and isinstance(value, tuple)):
            self._check_scalar(value, self.name)
            return
        if len(value) < 2:
            raise CoterieError(f"{self.name} as a list needs two entries or more, not {value!r}")
        for entry, label in self._labelled(value):
            self._check_scalar(entry, label)

    def _labelled(self, entries: Sequence[ScalarValue]) -> list[tuple[ScalarValue, str]]:
        """Each entry with what a complaint calls it: "beta", or "entry 2 of 4 of beta"."""
        n = len(entries)
        labels = [
            f"entry {i} of {n} of {self.name}" if n > 1 else self.name for i in range(1, n + 1)
        ]
        return list(zip(entries, labels, strict=True))

    def _parse_scalar(self, text: ScalarValue, label: str) -> ScalarValue:
        noun, convert = PARSERS[self.value_type]
        if not text:
            raise CoterieError(f"{label} is empty")
        if (value := self._value_of(text)) != text or text in self.keywords:
            return value
        try:
            return convert(str(text))
        except (ValueError, KeyError):
            known = " or ".join((noun, *self.keywords))
            raise CoterieError(f"{label} must be {known}, not {text!r}") from None

    def word(self, value: str) -> str:
        """As a value is printed."""
        return next((one.printed for one in self.spelt if one.value == value), value)

    def _value_of(self, text: ScalarValue) -> ScalarValue:
        return next((one.value for one in self.spelt if one.printed == text), text)

    def _check_scalar(self, value: OptionValue, label: str) -> None:
        if value in self.keywords:
            return
        if self.choices:
            if value not in self.choices:
                known = ", ".join(map(self.word, self.choices))
                raise CoterieError(f"{label} must be one of {known}, not {value!r}")
        elif isinstance(value, bool) != (self.value_type is bool) or not isinstance(
            value, (int, float) if self.value_type is float else self.value_type
        ):
            list_hint = " or a tuple of it" if self.accepts_list and label == self.name else ""
            raise CoterieError(
                f"{label} must be of type {self.value_type.__name__}{list_hint}, not {value!r}"
            )
        elif isinstance(value, int | float) and value not in self.bounds:
            raise CoterieError(f"{label} must be {self.bounds}, not {value!r}")


def parse_spec(text: str, table: Mapping[str, type[SpecT]], noun: str) -> SpecT:
    """The choice that ``text`` spells, of one of the classes in ``table``.

    Raises CoterieError, which names the ``noun`` ("policy") and what would have worked.
    """
    name, _, rest = text.strip().partition(":")
    if name not in table:
        raise CoterieError(f"unknown {noun} {name!r}; known: {', '.join(sorted(table))}")
    known_options = spec_options(table[name])
    try:
        option_values = {
            key: known_options[key].parse_value(value)
            for key, value in _parse_pairs(rest, known_options)
        }
        required = [
            option.name for option in known_options.values() if option.default == "required"
        ]
        if missing := [key for key in required if key not in option_values]:
            raise CoterieError(f"needs {', '.join(missing)}")
        return _build(table[name], known_options, option_values)
    except CoterieError as error:
        raise CoterieError(f"{noun} {text!r}: {error}") from None


def format_spec(spec: object, table: Mapping[str, type[object]]) -> str:
    """The text that ``parse`` reads back as ``choice``; defaults are left out."""
    name = next((name for name, cls in table.items() if type(spec) is cls), None)
    if name is None:
        raise CoterieError(f"{spec!r} has no name; known: {', '.join(sorted(table))}")
    values = {option: _get_value(spec, option) for option in spec_options(type(spec)).values()}
    parts = [
        f"{option.name}={_format_value(value, option)}"
        for option, value in values.items()
        if value is not None and (option.always_printed or value != option.default)
    ]
    return f"{name}:{','.join(parts)}" if parts else name


def update_spec_text(text: str, table: Mapping[str, type[object]]) -> str:
    """The same text with the present names of options and words of values; what cannot be read
    stays as it is. Nothing else changes: order, numbers, and options at their defaults."""
    name, colon, rest = text.partition(":")
    if name not in table or not colon:
        return text
    offered = spec_options(table[name])
    said = []
    for item in rest.split(","):
        key, equals, value = item.partition("=")
        option = _named(key.strip(), offered)
        if equals and option is not None:
            key, value = option.name, option.word(value.strip())
        said.append(f"{key}{equals}{value}")
    return f"{name}:{','.join(said)}"


@cache
def spec_options(cls: type) -> Mapping[str, Option]:
    """Every option of a class by name, in the order of its spelling."""
    options_by_name = {}
    for field, hint, metadata in _fields(cls):
        nested = next((item for item in metadata if isinstance(item, NestedOptions)), None)
        if nested is None:
            option = _make_option(field, hint, metadata)
            options_by_name[option.name] = option
            continue
        inner_options = _direct_options(type(field.default))
        for name in (name for name in inner_options if name in nested.names):
            options_by_name[name] = replace(
                inner_options[name],
                parent_field=field.name,
                default=getattr(field.default, inner_options[name].attribute),
                always_printed=name in nested.always_printed,
            )
    return options_by_name


def check_options(value: object) -> None:
    """Raises for a field that its annotation forbids; a dataclass's ``__post_init__``."""
    for option in _direct_options(type(value)).values():
        option.check(getattr(value, option.attribute))


@cache
def _direct_options(cls: type) -> Mapping[str, Option]:
    """Options that are fields of the class itself, by name."""
    plain_fields = (_make_option(*entry) for entry in _fields(cls) if not is_dataclass(entry[1]))
    return {option.name: option for option in plain_fields}


def _fields(cls: type) -> Iterator[tuple[Field[object], type, tuple[object, ...]]]:
    """(field, plain type or Literal, notes of its ``Annotated``) of a dataclass; of a field that
    takes a list, the type of an entry, and LIST among the notes."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        hint, metadata = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, *extra = get_args(hint)
            metadata = tuple(extra)
        if get_origin(hint) in (Union, UnionType):
            members = [member for member in get_args(hint) if member is not NoneType]
            metadata = (
                (*metadata, ACCEPTS_LIST)
                if any(get_origin(member) is tuple for member in members)
                else metadata
            )
            scalars = [member for member in members if get_origin(member) is not tuple]
            numeric = [member for member in scalars if get_origin(member) is not Literal]
            hint = (numeric or scalars)[0]
            metadata = (*metadata, *(member for member in scalars if member is not hint))
        if get_origin(hint) is Annotated:
            hint, *extra = get_args(hint)
            metadata = (*metadata, *extra)
        yield field, hint, metadata


def _make_option(field: Field[object], hint: type, metadata: tuple[object, ...]) -> Option:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    key = next((item for item in metadata if isinstance(item, Key)), Key(field.name))
    return Option(
        name=key.name,
        attribute=field.name,
        parent_field="",
        value_type=str if choices else hint,
        choices=choices,
        bounds=next((item for item in metadata if isinstance(item, Bounds)), Bounds()),
        default="required" if field.default is MISSING else field.default,  # pyright: ignore[reportArgumentType]
        always_printed=ALWAYS_PRINTED in metadata,
        accepts_list=ACCEPTS_LIST in metadata,
        keywords=tuple(
            word for item in metadata if get_origin(item) is Literal for word in get_args(item)
        ),
        also=key.also,
        spelt=tuple(item for item in metadata if isinstance(item, ValueAlias)),
    )


def _parse_pairs(rest: str, known_options: Mapping[str, Option]) -> list[tuple[str, str]]:
    pairs = []
    for item in rest.split(",") if rest.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise CoterieError(f"{item.strip()!r} is not of the form option=value")
        option = _named(key, known_options)
        if option is None:
            known = ", ".join(known_options) or "none"
            raise CoterieError(f"unknown option {key!r}; it has: {known}")
        if option.name in dict(pairs):
            raise CoterieError(f"{option.name} is given twice")
        pairs.append((option.name, value))
    return pairs


def _named(name: str, offered: Mapping[str, Option]) -> Option | None:
    """The option with this name, or with it among the names that are read too."""
    found = offered.get(name)
    return found or next((option for option in offered.values() if name in option.also), None)


def _build(
    cls: type[SpecT], known_options: Mapping[str, Option], option_values: Mapping[str, OptionValue]
) -> SpecT:
    """An instance of ``cls``; options of a part change that part's default."""
    parts: dict[str, dict[str, OptionValue]] = {}
    for key, value in option_values.items():
        parts.setdefault(known_options[key].parent_field, {})[known_options[key].attribute] = value
    arguments: dict[str, object] = dict(parts.pop("", {}))
    for part, values in parts.items():
        arguments[part] = replace(getattr(cls, part), **values)
    return cls(**arguments)


def _get_value(spec: object, option: Option) -> OptionValue:
    owner = getattr(spec, option.parent_field) if option.parent_field else spec
    return getattr(owner, option.attribute)


def _format_value(value: OptionValue, option: Option) -> str:
    """Shortest text that reads back as the same value: 1 for 1.0."""
    if isinstance(value, tuple):
        return LIST_SEPARATOR.join(_format_value(entry, option) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return option.word(value)
    text = str(value)
    return text.removesuffix(".0") if isinstance(value, float) else text


PARSERS: dict[
    type, tuple[str, Callable[[str], ScalarValue]]
] = {  # what it is called, how it is read
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("yes or no", {"yes": True, "no": False}.__getitem__),
    str: ("a word", str),
}
