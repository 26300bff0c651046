"""From a folder of safetensors to weights in place: strict, streaming, one pass over each file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.model.shard import DTYPES, Entry, no_float, read_header
from coterie.model.strictjson import read_object
from coterie.model.weights import Place
from coterie.naming import CoterieError

Fill = Callable[[int, Entry, Place], None]
"""Takes an open file, one of its tensors, and where that goes."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds: every file's tensors, headers checked, nothing loaded."""

    folder: Path
    files: Mapping[Path, Mapping[str, Entry]]

    @staticmethod
    def of(folder: Path) -> Checkpoint:
        """Raises CoterieError when there are no safetensors, or index and files disagree."""
        index, single = folder / INDEX, folder / SINGLE
        if os.path.lexists(index):
            return Checkpoint(folder, _indexed(index))
        if os.path.lexists(single):
            return Checkpoint(folder, {single: read_header(single)})
        raise _nothing_to_load(folder)

    @property
    def tensors(self) -> set[str]:
        return {name for entries in self.files.values() for name in entries}

    @property
    def bytes(self) -> int:
        return sum(e.size for entries in self.files.values() for e in entries.values())

    def check(self, places: Mapping[str, Place]) -> None:
        """Raise unless exactly these tensors are here, each in its shape."""
        where = {name: file for file, entries in self.files.items() for name in entries}
        if missing := sorted(set(places) - set(where)):
            raise CoterieError(f"{self._origin()}: {_first(missing)} missing")
        if extra := sorted(set(where) - set(places)):
            raise CoterieError(
                f"{where[extra[0]]}: {_first(extra)} not part of the model that config.json tells"
            )
        for name, place in places.items():
            entry = self.files[where[name]][name]
            if problem := _wrong_dtype(entry, place):
                raise CoterieError(f"{where[name]}: {problem}")
            shape = entry.shape
            if shape != place.shape:
                raise CoterieError(
                    f"{where[name]}: {name} has shape {list(shape)}, "
                    f"config.json makes it {list(place.shape)}"
                )

    def load(
        self,
        places: Mapping[str, Place],
        fill: Fill,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Hand every tensor with its place to ``fill``; progress hears bytes as they land.

        One pass over each file, a few megabytes beside the weights, however the shards are cut.
        """
        self.check(places)
        for file, entries in self.files.items():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                for entry in entries.values():
                    fill(descriptor, entry, places[entry.name])
                    if progress is not None:
                        progress(entry.size)
            except OSError as error:
                raise CoterieError(f"{file}: cannot be read ({error.strerror})") from None
            except CoterieError as error:
                raise CoterieError(f"{file}: {error}") from None
            finally:
                os.close(descriptor)

    def _origin(self) -> Path:
        """The file that should have named every tensor."""
        index = self.folder / INDEX
        return index if index.exists() else self.folder / SINGLE


def _wrong_dtype(entry: Entry, place: Place) -> str | None:
    called = {dtype: name for name, dtype in DTYPES.items()}
    if place.dtype is None and not entry.dtype.is_floating_point:
        return no_float(entry.name, called[entry.dtype])
    if place.dtype not in (None, entry.dtype):
        wanted = called[place.dtype]
        return f"{entry.name} is {called[entry.dtype]}, config.json makes it {wanted}"
    return None


def _indexed(index: Path) -> dict[Path, dict[str, Entry]]:
    """Every file that the index names, holding exactly the tensors that the index says."""
    promised: dict[str, set[str]] = {}
    for name, file in _weight_map(index).items():
        promised.setdefault(file, set()).add(name)
    found: dict[Path, dict[str, Entry]] = {}
    owner: dict[str, str] = {}
    for file, names in promised.items():
        path = index.parent / file
        if not path.exists():
            raise CoterieError(f"{index}: names {file} for {min(names)}: no such file")
        found[path] = read_header(path)
        for name in found[path]:
            if name in owner:
                raise CoterieError(f"{path}: {name} is also in {owner[name]}")
            owner[name] = file
    for file, names in promised.items():
        _check_promise(index, file, names, found[index.parent / file], owner)
    return found


def _check_promise(
    index: Path, file: str, names: set[str], held: Iterable[str], owner: Mapping[str, str]
) -> None:
    if lacking := sorted(names - set(held)):
        elsewhere = owner.get(lacking[0])
        hint = f"it is in {elsewhere}" if elsewhere else "it is in no file"
        raise CoterieError(f"{index}: says {lacking[0]} is in {file}, but {hint}")
    if unnamed := sorted(set(held) - names):
        raise CoterieError(f"{index}: does not list {unnamed[0]}, which is in {file}")


def _weight_map(index: Path) -> dict[str, str]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CoterieError(f"{index}: has no weight_map from tensors to files")
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CoterieError(f"{index}: {name} is said to be in {file!r}, not a file beside it")
    return names


def _nothing_to_load(folder: Path) -> CoterieError:
    if not folder.is_dir():
        return CoterieError(f"{folder}: no such folder")
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return CoterieError(
            f"{folder}: has {pickles[0]} but no {SINGLE}; pickled weights are never opened, "
            "convert them to safetensors"
        )
    shards = sorted(f.name for f in folder.glob("*.safetensors"))
    if shards:
        return CoterieError(f"{folder}: has {shards[0]} but neither {SINGLE} nor {INDEX}")
    return CoterieError(f"{folder}: has neither {SINGLE} nor {INDEX}")


def _first(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{names[0]} and {len(names) - 1} more are"
