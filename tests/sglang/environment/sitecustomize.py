"""Stand-ins for the packages of SGLang that have no CPU build: it imports them and calls none.

Python imports this module when it starts, in SGLang's child processes too, if its folder is on
PYTHONPATH.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

PACKAGES = ("sgl_kernel", "torchvision", "torchaudio", "cutlass")


class Missing:
    """A name of a package that is not installed, and all names inside it; it fails when called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("_"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __call__(self, *args: object, **options: object) -> object:
        raise RuntimeError(f"{self._name} is a stand-in for tests and cannot be called")


class StandIn(types.ModuleType):
    """A module in which every public name is ``Missing``."""

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages and all modules inside them."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> StandIn:
        module = StandIn(spec.name)
        module.__version__ = "0.0.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(
    StandInFinder(tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None))
)
