"""Loading a folder of safetensors: strict checks, then one streaming pass over each file."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coterie.errors import CheckpointError, clip, quote
from coterie.files import opened
from coterie.model.quant_methods import REMEDY
from coterie.model.safetensors_file import DTYPE_NAMES, TensorEntry, not_float_message, read_header
from coterie.model.weights import TensorTarget
from coterie.strict_json import LISTING_FILE, read_object

TensorLoader = Callable[[int, TensorEntry, TensorTarget], None]
"""Called with an open file, one of its tensors, and the target of that tensor."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint folder. Headers are checked; weights are not loaded."""

    folder: Path
    files: Mapping[Path, Mapping[str, TensorEntry]]

    @staticmethod
    def of(folder: Path) -> Checkpoint:
        """Reads the headers. Raises CheckpointError without safetensors or with a wrong index."""
        index, single_file = folder / INDEX_FILE, folder / SINGLE_FILE
        if os.path.lexists(index):
            return Checkpoint(folder, _read_indexed_files(index))
        if os.path.lexists(single_file):
            return Checkpoint(folder, {single_file: read_header(single_file)})
        raise _no_weights_error(folder)

    def without(self, prefixes: tuple[str, ...]) -> Checkpoint:
        """The checkpoint without tensors of these prefixes, and without files of no others."""
        kept = {
            file: {name: e for name, e in entries.items() if not name.startswith(prefixes)}
            for file, entries in self.files.items()
        }
        return Checkpoint(self.folder, {file: entries for file, entries in kept.items() if entries})

    @property
    def tensors(self) -> set[str]:
        return {name for entries in self.files.values() for name in entries}

    @property
    def bytes(self) -> int:
        return sum(e.size for entries in self.files.values() for e in entries.values())

    def check(self, targets: Mapping[str, TensorTarget]) -> None:
        """Raises CheckpointError unless exactly these tensors exist, with shape and dtype."""
        file_of = {name: file for file, entries in self.files.items() for name in entries}
        if missing := sorted(set(targets) - set(file_of)):
            _check_prefix(self._listing_file(), missing, set(file_of) - set(targets))
            raise CheckpointError(f"{self._listing_file()}: {_first_of(missing)} missing")
        if extra := sorted(set(file_of) - set(targets)):
            raise CheckpointError(
                f"{file_of[extra[0]]}: {_first_of(extra)} not part of the model that config.json "
                "describes"
            )
        for name, target in targets.items():
            entry = self.files[file_of[name]][name]
            if problem := _dtype_problem(entry, target):
                raise CheckpointError(f"{file_of[name]}: {problem}")
            shape = entry.shape
            if shape != target.shape:
                raise CheckpointError(
                    f"{file_of[name]}: {name} has shape {list(shape)}, "
                    f"config.json makes it {list(target.shape)}"
                )

    def load(
        self,
        targets: Mapping[str, TensorTarget],
        load_tensor: TensorLoader,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Calls ``load_tensor`` with every tensor and its target.

        One pass over each file, with a few megabytes besides the weights for any sharding.
        ``on_progress`` receives the bytes of each loaded tensor.
        """
        self.check(targets)
        for file, entries in self.files.items():
            with opened(file) as descriptor:
                for entry in entries.values():
                    load_tensor(descriptor, entry, targets[entry.name])
                    if on_progress is not None:
                        on_progress(entry.size)

    def _listing_file(self) -> Path:
        """The file that lists all tensors."""
        index = self.folder / INDEX_FILE
        return index if index.exists() else self.folder / SINGLE_FILE


def _check_prefix(file: Path, missing: Sequence[str], extra: Collection[str]) -> None:
    """Raises CheckpointError if all names have a prefix too many, or lack one."""
    name = min(missing, key=len)
    prefix = next((n.removesuffix(name) for n in extra if n.endswith(f".{name}")), "")
    if prefix and all(prefix + name in extra for name in missing):
        raise CheckpointError(
            f"{file}: the tensor names have the prefix {clip(prefix)!r}; save the model without "
            "the wrapper that adds it"
        )
    prefixes = {name.partition(".")[0] + "." for name in missing}
    if len(prefixes) == 1 and all(n.removeprefix(*prefixes) in extra for n in missing):
        raise CheckpointError(
            f"{file}: the tensor names lack the prefix {prefixes.pop()!r}; save the whole model "
            "with its head"
        )


def _dtype_problem(entry: TensorEntry, target: TensorTarget) -> str | None:
    name, dtype = clip(entry.name), DTYPE_NAMES[entry.dtype]
    if target.dtype is None and not entry.dtype.is_floating_point:
        return not_float_message(name, dtype)
    if target.dtype not in (None, entry.dtype):
        return f"{name} is {dtype}, config.json makes it {DTYPE_NAMES[target.dtype]}"
    return None


def _read_indexed_files(index: Path) -> dict[Path, dict[str, TensorEntry]]:
    """The headers of all indexed files, checked against the index."""
    indexed_names: dict[str, set[str]] = {}
    for name, file in _weight_map(index).items():
        indexed_names.setdefault(file, set()).add(name)
    headers: dict[Path, dict[str, TensorEntry]] = {}
    file_of: dict[str, str] = {}
    for file, names in indexed_names.items():
        path = index.parent / file
        if not path.exists():
            raise CheckpointError(
                f"{index}: names {clip(file)} for {clip(min(names))}: no such file"
            )
        headers[path] = read_header(path)
        for name in headers[path]:
            if name in file_of:
                raise CheckpointError(f"{path}: {clip(name)} is also in {file_of[name]}")
            file_of[name] = file
    for file, names in indexed_names.items():
        _check_index_entry(index, file, names, headers[index.parent / file], file_of)
    return headers


def _check_index_entry(
    index: Path, file: str, names: set[str], stored: Iterable[str], file_of: Mapping[str, str]
) -> None:
    if missing := sorted(names - set(stored)):
        other_file = file_of.get(missing[0])
        hint = f"it is in {other_file}" if other_file else "it is in no file"
        raise CheckpointError(f"{index}: maps {clip(missing[0])} to {file}, but {hint}")
    if unlisted := sorted(set(stored) - names):
        raise CheckpointError(f"{index}: does not list {clip(unlisted[0])}, which is in {file}")


def _weight_map(index: Path) -> dict[str, str]:
    names = read_object(index, LISTING_FILE).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: has no weight_map from tensors to files")
    for name, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{index}: {clip(name)} maps to {quote(file)}, not to a file name in this folder"
            )
    return names


def _no_weights_error(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(f"{folder}: no such folder")
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return CheckpointError(
            f"{folder}: has {pickles[0]} but no {SINGLE_FILE}; pickled weights are never opened, "
            "convert them to safetensors"
        )
    if others := sorted(f.name for f in folder.glob("*.gguf")):
        return CheckpointError(f"{folder}: has {others[0]}, but GGUF is not read: {REMEDY}")
    shards = sorted(f.name for f in folder.glob("*.safetensors"))
    if shards:
        return CheckpointError(
            f"{folder}: has {shards[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}"
        )
    return CheckpointError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _first_of(names: list[str]) -> str:
    if len(names) == 1:
        return f"{clip(names[0])} is"
    return f"{clip(names[0])} and {len(names) - 1} more are"
