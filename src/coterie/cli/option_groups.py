"""Options that several commands take together, and that one function reads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import get_type_hints

AnyFunction = Callable[..., object]
Parameters = list[inspect.Parameter]


def option_group(**readers: AnyFunction) -> Callable[[AnyFunction], AnyFunction]:
    """A command that gets, by each of these names, what a reader makes of its own options.

    The readers' options stand in the command's in the place of that name; all are keywords.
    """

    def decorate(command: AnyFunction) -> AnyFunction:
        flattened: Parameters = []
        for parameter in parameters(command):
            flattened += (
                parameters(readers[parameter.name]) if parameter.name in readers else [parameter]
            )
        groups = {
            name: [parameter.name for parameter in parameters(read)]
            for name, read in readers.items()
        }

        @functools.wraps(command)
        def run_command(**option_values: object) -> object:
            for name, option_names in groups.items():
                option_values[name] = readers[name](
                    **{option: option_values.pop(option) for option in option_names}
                )
            return command(**option_values)

        signature = inspect.Signature(
            [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in flattened]
        )
        run_command.__signature__ = signature  # type: ignore[attr-defined]
        run_command.__annotations__ = {
            parameter.name: parameter.annotation for parameter in flattened
        }
        return run_command

    return decorate


def parameters(function: AnyFunction) -> Parameters:
    """Those of a function, with the types that their annotations name."""
    types = get_type_hints(function, include_extras=True)
    return [
        parameter.replace(annotation=types[parameter.name])
        for parameter in inspect.signature(function).parameters.values()
    ]
