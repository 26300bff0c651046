"""Routing policies from outside the package: from a Python file, or from an installed package."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from coterie.errors import ConfigError, CoterieError
from coterie.routing.registry import POLICIES
from coterie.specs import spec_options

ENTRY_POINTS = "coterie.policies"  # entry-point group: name = "package.module:Class"
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
PolicyClass = TypeVar("PolicyClass", bound=type)


def register_policy(name: str) -> Callable[[PolicyClass], PolicyClass]:
    """A class decorator that makes a frozen dataclass with ``eligible`` a policy called ``name``.

    Raises ConfigError for a name that is taken or not like ``my-vote``, and for another class.
    """

    def register(cls: PolicyClass) -> PolicyClass:
        if not NAME.fullmatch(name):
            raise ConfigError(f"policy name {name!r} is not of the form my-vote")
        if name in POLICIES:
            raise ConfigError(f"there is a policy {name!r} already: {POLICIES[name].__name__}")
        dataclass_params = getattr(cls, "__dataclass_params__", None)
        if dataclass_params is None or not dataclass_params.frozen:
            raise ConfigError(f"policy {name!r}: {cls!r} is not a frozen dataclass")
        if not callable(getattr(cls, "eligible", None)):
            raise ConfigError(f"policy {name!r}: {cls.__name__} has no method `eligible`")
        spec_options(cls)  # raises for an annotation that is no option
        POLICIES[name] = cls
        return cls

    return register


def import_policies(path: Path) -> list[str]:
    """Run a Python file, and return the names of the policies that it registered.

    Raises ConfigError if the file fails or registers none.
    """
    before = set(POLICIES)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        runpy.run_path(str(path), run_name=path.stem)
    except CoterieError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    names = [name for name in POLICIES if name not in before]
    if not names:
        raise ConfigError(f'{path}: it registers no policy; use @coterie.register_policy("name")')
    return names


@cache
def load_installed_policies() -> None:
    """Register the policies of installed packages (entry points of ``coterie.policies``), once.

    Raises ConfigError that names the package.
    """
    for entry in entry_points(group=ENTRY_POINTS):
        package = entry.dist.name if entry.dist is not None else entry.value
        try:
            register_policy(entry.name)(entry.load())
        except Exception as error:
            raise ConfigError(f"policy {entry.name!r} of package {package}: {error}") from error
