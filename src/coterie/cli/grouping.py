"""Options that several commands take together, and that one function reads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import get_type_hints

Function = Callable[..., object]
Parameters = list[inspect.Parameter]


def takes(**readers: Function) -> Callable[[Function], Function]:
    """A command that gets, by each of these names, what a reader makes of its own options.

    The readers' options stand in the command's in the place of that name; all are keywords.
    """

    def grouped(command: Function) -> Function:
        spread: Parameters = []
        for one in parameters(command):
            spread += parameters(readers[one.name]) if one.name in readers else [one]
        groups = {name: [one.name for one in parameters(read)] for name, read in readers.items()}

        @functools.wraps(command)
        def called(**typed: object) -> object:
            for name, own in groups.items():
                typed[name] = readers[name](**{option: typed.pop(option) for option in own})
            return command(**typed)

        described = inspect.Signature([one.replace(kind=one.KEYWORD_ONLY) for one in spread])
        called.__signature__ = described  # type: ignore[attr-defined]
        called.__annotations__ = {one.name: one.annotation for one in spread}
        return called

    return grouped


def parameters(function: Function) -> Parameters:
    """Those of a function, with the types that their annotations name."""
    types = get_type_hints(function, include_extras=True)
    return [
        one.replace(annotation=types[one.name])
        for one in inspect.signature(function).parameters.values()
    ]
