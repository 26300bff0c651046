"""JSON keys: what a field of a dataclass is called on disk, whatever its attribute is called.

``count: Annotated[int, Key("most")]`` is written as "most" and read from it. A key is part of a
format: it stays when the attribute gets another name. Names after the first are read too. A field
without a key, in a class where others have one, is not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


class Key:
    """The key of a field, and other names that are read as the same key."""

    __slots__ = ("also", "name")

    def __init__(self, name: str, *also: str) -> None:
        self.name, self.also = name, also

    def __repr__(self) -> str:
        return f"Key{(self.name, *self.also)!r}"


@cache
def keys_of(cls: type) -> Mapping[str, Key]:
    """The key of each attribute that has one, in the order of the fields."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in fields(cls):
        hint = hints[field.name]
        notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if (key := next((note for note in notes if isinstance(note, Key)), None)) is not None:
            found[field.name] = key
    if not found:
        raise TypeError(f"{cls.__name__} has no keys")
    return found


def names_of(cls: type) -> tuple[str, ...]:
    """The keys of a class, in the order of its fields."""
    return tuple(key.name for key in keys_of(cls).values())


def to_json(value: object) -> Any:
    """A dataclass as a dict by its keys, and what is inside it; other values as they are."""
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
    """The instance with these values; raises TypeError for an unknown key or a missing one."""
    return cls(**_attributes(cls, document, ()))


def by_attribute(cls: type, options: Mapping[str, object]) -> dict[str, Any]:
    """The same options by attribute; they come by key or by attribute."""
    return _attributes(cls, options, keys_of(cls))


def by_key(cls: type, options: Mapping[str, object]) -> dict[str, Any]:
    """The same options by key; they come by key or by attribute, and others stay as they are."""
    named = {name: key.name for name, key in keys_of(cls).items()}
    named |= {name: key.name for key in keys_of(cls).values() for name in (key.name, *key.also)}
    return {named.get(name, name): value for name, value in options.items()}


def _attributes(
    cls: type, options: Mapping[str, object], also: Mapping[str, Key] | tuple[()]
) -> dict[str, Any]:
    known = {name: name for name in also}
    for attribute, key in keys_of(cls).items():
        known |= dict.fromkeys((key.name, *key.also), attribute)
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"{cls.__name__} has no {unknown[0]!r}")
    return {known[name]: value for name, value in options.items()}
