"""Empty packages in place of those without a CPU build: SGLang imports them and calls none."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types


class Missing:
    """A name of a package that is not installed, and all names inside it; it fails when called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.name}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise RuntimeError(f"{self.name} is a stand-in for tests and cannot be called")


class StandIn(types.ModuleType):
    """A module in which every public name is ``Missing``."""

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class SubmoduleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule of one package as a stand-in."""

    def __init__(self, package: str) -> None:
        self.prefix = f"{package}."

    def find_spec(
        self, name: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(self.prefix):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def replace_package(name: str) -> None:
    """Makes the package ``name``, which is being imported, a stand-in."""
    sys.modules[name].__class__ = StandIn
    sys.meta_path.append(SubmoduleFinder(name))
