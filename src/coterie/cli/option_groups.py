"""Options that several commands share, as fields of one dataclass parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

Command = Callable[..., object]


def with_option_groups(command: Command) -> Command:
    """The command as typer reads it: each field of a dataclass parameter becomes one option.

    All parameters become keywords."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(command).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            entries = [(parameter.name, hints[parameter.name], parameter.default)]
        else:
            types = get_type_hints(group, include_extras=True)
            entries = [(field.name, types[field.name], field.default) for field in fields(group)]
        for name, hint, default in entries:
            kind = inspect.Parameter.KEYWORD_ONLY
            options[name] = inspect.Parameter(name, kind, default=default, annotation=hint)

    @functools.wraps(command)
    def run_command(**values: object) -> object:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    run_command.__signature__ = inspect.Signature(list(options.values()))  # type: ignore[attr-defined]
    run_command.__annotations__ = {name: option.annotation for name, option in options.items()}
    return run_command
