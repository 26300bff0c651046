"""JSON keys of dataclass fields, independent of the attributes' names.

``count: Annotated[int, Key("most")]`` is written and read as "most". A key is part of a file
format: it stays when the attribute is renamed. Further names of a key are aliases, which are only
read. A field without a key is not written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


class Key:
    """An annotation: the key of a field, and aliases that are read as the same key."""

    __slots__ = ("aliases", "name")

    def __init__(self, name: str, *aliases: str) -> None:
        self.name, self.aliases = name, aliases

    def __repr__(self) -> str:
        return f"Key{(self.name, *self.aliases)!r}"


@cache
def keys_of(cls: type) -> Mapping[str, Key]:
    """The key of each attribute that has one, in field order."""
    hints = get_type_hints(cls, include_extras=True)
    keys = {}
    for field in fields(cls):
        hint = hints[field.name]
        notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if (key := next((note for note in notes if isinstance(note, Key)), None)) is not None:
            keys[field.name] = key
    if not keys:
        raise TypeError(f"{cls.__name__} has no keys")
    return keys


def names_of(cls: type) -> tuple[str, ...]:
    """The names of a class's keys, in field order."""
    return tuple(key.name for key in keys_of(cls).values())


def to_json(value: object) -> Any:
    """A JSON value: dataclasses become dicts by key, also inside lists and dicts."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            key.name: to_json(getattr(value, attribute))
            for attribute, key in keys_of(type(value)).items()
        }
    if isinstance(value, Mapping):
        return {key: to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([to_json(inner) for inner in value])
    return value


def from_json(cls: type[Record], document: Mapping[str, object]) -> Record:
    """The instance with these values; raises TypeError for an unknown or a missing key."""
    return cls(**_attributes(cls, document, ()))


def by_attribute(cls: type, options: Mapping[str, object]) -> dict[str, Any]:
    """Options by attribute, from options by key or by attribute."""
    return _attributes(cls, options, keys_of(cls))


def by_key(cls: type, options: Mapping[str, object]) -> dict[str, Any]:
    """Options by key, from options by key or by attribute; unknown names stay."""
    named = {name: key.name for name, key in keys_of(cls).items()}
    named |= {name: key.name for key in keys_of(cls).values() for name in (key.name, *key.aliases)}
    return {named.get(name, name): value for name, value in options.items()}


def _attributes(
    cls: type, options: Mapping[str, object], attributes: Iterable[str]
) -> dict[str, Any]:
    known = {name: name for name in attributes}
    for attribute, key in keys_of(cls).items():
        known |= dict.fromkeys((key.name, *key.aliases), attribute)
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"{cls.__name__} has no {unknown[0]!r}")
    return {known[name]: value for name, value in options.items()}
