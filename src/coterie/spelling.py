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

from coterie.keys import Key
from coterie.naming import CoterieError

Single = str | int | float
Value = Single | tuple[Single, ...] | None
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Within:
    """A range: ``least <= value <= most`` and ``above < value < below``; never NaN or infinite."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        inside = self.least <= value <= self.most and self.above < value < self.below
        return inside and -math.inf < value < math.inf

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.least}
        bounds |= {"at most": self.most, "below": self.below}
        told = [f"{word} {bound:g}" for word, bound in bounds.items() if abs(bound) < math.inf]
        return " and ".join(told) or "finite"


Share = Annotated[float, Within(above=0, most=1)]  # something of a whole
Part = Annotated[float, Within(least=0, most=1)]  # perhaps nothing of it
Count = Annotated[int, Within(least=1)]
Whole = Annotated[int, Within(least=0)]  # a count that may be none
Amount = Annotated[float, Within(least=0)]
Shares = Share | tuple[Share, ...]  # one for all, or one each: 0.3/0.2/0.25

BETWEEN = "/"  # the entries of a list


@dataclass(frozen=True)
class Shown:
    """This option is printed even at its default."""


@dataclass(frozen=True)
class Offers:
    """Which options of a part a choice offers, by name, and which of them it always prints."""

    names: tuple[str, ...]
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spelt:
    """The word that a value is printed as; it is read as this word and as itself."""

    value: str
    word: str

    def of(self, value: str) -> str:
        """The word of this value; any other value is its own."""
        return self.word if value == self.value else value


SHOWN = Shown()
LIST = object()  # a note: this option also takes a list


@dataclass(frozen=True)
class Option:
    """One option: where it lives (``part``: the field that holds it, "" = the choice itself)."""

    name: str  # as it is printed
    attribute: str  # the field that holds its value
    part: str
    kind: type  # int, float, bool or str; of each entry, where it takes a list
    choices: tuple[str, ...]
    within: Within
    default: Value | Literal["required"]
    shown: bool
    many: bool = False  # it also takes a list, as a tuple of at least two entries
    words: tuple[str, ...] = ()  # which it takes beside numbers
    also: tuple[str, ...] = ()  # names that are read as this one
    spelt: tuple[Spelt, ...] = ()  # values that are printed as another word

    def read(self, text: str) -> Value:
        """The value that ``text`` spells, its range not yet checked."""
        entries = [entry.strip() for entry in text.split(BETWEEN)] if self.many else [text]
        first, *others = [self._single(entry, told) for entry, told in self._told(entries)]
        return (first, *others) if others else first

    def check(self, value: Value) -> None:
        """Raises unless ``value`` is one that this option can take; names the entry of a list."""
        if value is None and self.default is None:
            return
        if not (self.many and isinstance(value, tuple)):
            self._check_single(value, self.name)
            return
        if len(value) < 2:
            raise CoterieError(f"{self.name} as a list needs two entries or more, not {value!r}")
        for entry, told in self._told(value):
            self._check_single(entry, told)

    def _told(self, entries: Sequence[Single]) -> list[tuple[Single, str]]:
        """Each entry with what a complaint calls it: "beta", or "entry 2 of 4 of beta"."""
        n = len(entries)
        places = [
            f"entry {i} of {n} of {self.name}" if n > 1 else self.name for i in range(1, n + 1)
        ]
        return list(zip(entries, places, strict=True))

    def _single(self, text: Single, told: str) -> Single:
        noun, read = READERS[self.kind]
        if not text:
            raise CoterieError(f"{told} is empty")
        if (value := self._value_of(text)) != text or text in self.words:
            return value
        try:
            return read(str(text))
        except (ValueError, KeyError):
            known = " or ".join((noun, *self.words))
            raise CoterieError(f"{told} must be {known}, not {text!r}") from None

    def word(self, value: str) -> str:
        """As a value is printed."""
        return next((one.word for one in self.spelt if one.value == value), value)

    def _value_of(self, text: Single) -> Single:
        return next((one.value for one in self.spelt if one.word == text), text)

    def _check_single(self, value: Value, told: str) -> None:
        if value in self.words:
            return
        if self.choices:
            if value not in self.choices:
                known = ", ".join(map(self.word, self.choices))
                raise CoterieError(f"{told} must be one of {known}, not {value!r}")
        elif isinstance(value, bool) != (self.kind is bool) or not isinstance(
            value, (int, float) if self.kind is float else self.kind
        ):
            lists = " or a tuple of it" if self.many and told == self.name else ""
            raise CoterieError(f"{told} must be of type {self.kind.__name__}{lists}, not {value!r}")
        elif isinstance(value, int | float) and value not in self.within:
            raise CoterieError(f"{told} must be {self.within}, not {value!r}")


def parse(text: str, table: Mapping[str, type[Choice]], noun: str) -> Choice:
    """The choice that ``text`` spells, of one of the classes in ``table``.

    Raises CoterieError, which names the ``noun`` ("policy") and what would have worked.
    """
    name, _, rest = text.strip().partition(":")
    if name not in table:
        raise CoterieError(f"unknown {noun} {name!r}; known: {', '.join(sorted(table))}")
    offered = options(table[name])
    try:
        given = {key: offered[key].read(value) for key, value in _pairs(rest, offered)}
        required = [option.name for option in offered.values() if option.default == "required"]
        if missing := [key for key in required if key not in given]:
            raise CoterieError(f"needs {', '.join(missing)}")
        return _build(table[name], offered, given)
    except CoterieError as error:
        raise CoterieError(f"{noun} {text!r}: {error}") from None


def spelled(choice: object, table: Mapping[str, type[object]]) -> str:
    """The text that ``parse`` reads back as ``choice``; defaults are left out."""
    name = next((name for name, cls in table.items() if type(choice) is cls), None)
    if name is None:
        raise CoterieError(f"{choice!r} has no name; known: {', '.join(sorted(table))}")
    values = {option: _value(choice, option) for option in options(type(choice)).values()}
    said = [
        f"{option.name}={_text(value, option)}"
        for option, value in values.items()
        if value is not None and (option.shown or value != option.default)
    ]
    return f"{name}:{','.join(said)}" if said else name


def respelled(text: str, table: Mapping[str, type[object]]) -> str:
    """The same text with the present names of options and words of values; what cannot be read
    stays as it is. Nothing else changes: order, numbers, and options at their defaults."""
    name, colon, rest = text.partition(":")
    if name not in table or not colon:
        return text
    offered = options(table[name])
    said = []
    for item in rest.split(","):
        key, equals, value = item.partition("=")
        option = _named(key.strip(), offered)
        if equals and option is not None:
            key, value = option.name, option.word(value.strip())
        said.append(f"{key}{equals}{value}")
    return f"{name}:{','.join(said)}"


@cache
def options(cls: type) -> Mapping[str, Option]:
    """Every option of a class by name, in the order of its spelling."""
    found = {}
    for field, hint, notes in _fields(cls):
        offers = next((note for note in notes if isinstance(note, Offers)), None)
        if offers is None:
            option = _option(field, hint, notes)
            found[option.name] = option
            continue
        inner = _own(type(field.default))
        for name in (name for name in inner if name in offers.names):
            found[name] = replace(
                inner[name],
                part=field.name,
                default=getattr(field.default, inner[name].attribute),
                shown=name in offers.shown,
            )
    return found


def check_options(value: object) -> None:
    """Raises for a field that its annotation forbids; a dataclass's ``__post_init__``."""
    for option in _own(type(value)).values():
        option.check(getattr(value, option.attribute))


@cache
def _own(cls: type) -> Mapping[str, Option]:
    """Options that are fields of the class itself, by name."""
    plain = (_option(*parts) for parts in _fields(cls) if not is_dataclass(parts[1]))
    return {option.name: option for option in plain}


def _fields(cls: type) -> Iterator[tuple[Field[object], type, tuple[object, ...]]]:
    """(field, plain type or Literal, notes of its ``Annotated``) of a dataclass; of a field that
    takes a list, the type of an entry, and LIST among the notes."""
    hints = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        hint, notes = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            notes = tuple(more)
        if get_origin(hint) in (Union, UnionType):
            arms = [arm for arm in get_args(hint) if arm is not NoneType]
            notes = (*notes, LIST) if any(get_origin(arm) is tuple for arm in arms) else notes
            single = [arm for arm in arms if get_origin(arm) is not tuple]
            numbers = [arm for arm in single if get_origin(arm) is not Literal]
            hint = (numbers or single)[0]
            notes = (*notes, *(arm for arm in single if arm is not hint))
        if get_origin(hint) is Annotated:
            hint, *more = get_args(hint)
            notes = (*notes, *more)
        yield field, hint, notes


def _option(field: Field[object], hint: type, notes: tuple[object, ...]) -> Option:
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    key = next((note for note in notes if isinstance(note, Key)), Key(field.name))
    return Option(
        name=key.name,
        attribute=field.name,
        part="",
        kind=str if choices else hint,
        choices=choices,
        within=next((note for note in notes if isinstance(note, Within)), Within()),
        default="required" if field.default is MISSING else field.default,  # pyright: ignore[reportArgumentType]
        shown=SHOWN in notes,
        many=LIST in notes,
        words=tuple(
            word for note in notes if get_origin(note) is Literal for word in get_args(note)
        ),
        also=key.also,
        spelt=tuple(note for note in notes if isinstance(note, Spelt)),
    )


def _pairs(rest: str, offered: Mapping[str, Option]) -> list[tuple[str, str]]:
    pairs = []
    for item in rest.split(",") if rest.strip() else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise CoterieError(f"{item.strip()!r} is not of the form option=value")
        option = _named(key, offered)
        if option is None:
            known = ", ".join(offered) or "none"
            raise CoterieError(f"unknown option {key!r}; it has: {known}")
        if option.name in dict(pairs):
            raise CoterieError(f"{option.name} is given twice")
        pairs.append((option.name, value))
    return pairs


def _named(name: str, offered: Mapping[str, Option]) -> Option | None:
    """The option with this name, or with it among the names that are read too."""
    found = offered.get(name)
    return found or next((option for option in offered.values() if name in option.also), None)


def _build(cls: type[Choice], offered: Mapping[str, Option], given: Mapping[str, Value]) -> Choice:
    """An instance of ``cls``; options of a part change that part's default."""
    parts: dict[str, dict[str, Value]] = {}
    for key, value in given.items():
        parts.setdefault(offered[key].part, {})[offered[key].attribute] = value
    arguments: dict[str, object] = dict(parts.pop("", {}))
    for part, values in parts.items():
        arguments[part] = replace(getattr(cls, part), **values)
    return cls(**arguments)


def _value(choice: object, option: Option) -> Value:
    holder = getattr(choice, option.part) if option.part else choice
    return getattr(holder, option.attribute)


def _text(value: Value, option: Option) -> str:
    """Shortest text that reads back as the same value: 1 for 1.0."""
    if isinstance(value, tuple):
        return BETWEEN.join(_text(entry, option) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return option.word(value)
    text = str(value)
    return text.removesuffix(".0") if isinstance(value, float) else text


READERS: dict[type, tuple[str, Callable[[str], Single]]] = {  # what it is called, how it is read
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("yes or no", {"yes": True, "no": False}.__getitem__),
    str: ("a word", str),
}
