"""The recorded generations of a reference folder, checked against its arrays."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from coterie.errors import CheckpointError
from coterie.files import opened
from coterie.strict_json import read_object

# Runs with a decision closer to a tie than this are reported, not judged.
TIE_MARGIN = 2e-6
# The families, as meta.json names them, and the arrays that only their sets have.
EXTRA_ARRAYS = {"lladamoe": (), "llada2": ("logits_fullattn",), "llada21": (), "sdar_moe": ()}
# Runs with this tag reproduce a known error of published code: reported, not judged.
KNOWN_ERROR_PREFIX = "off_"
MIN_CONFIDENCE = 1e-30  # every token passes this threshold


@dataclass(frozen=True)
class RecordedRun:
    """One entry of meta.json's ``generations`` with its arrays."""

    tag: str
    family: str
    entry: Mapping[str, object]
    prompts: list[list[int]]
    outputs: list[list[int]]
    arrays: ReferenceArrays

    @property
    def excuse(self) -> str:
        """Why differences are reported and not judged; empty if they are judged."""
        if self.family == "llada21" and self.tag.startswith(KNOWN_ERROR_PREFIX):
            return "reproduces a known error"
        return f"margin {self.margin:.1e}" if self.margin < TIE_MARGIN else ""

    @property
    def margin(self) -> float:
        """The smallest recorded margin between two decisions."""
        others = {key: value for key, value in self.entry.items() if key.endswith("_margin")}
        margins = {**self.fields.section("margins").values, **others}
        return min(_margin_values(self.location, margins), default=math.inf)

    @property
    def fields(self) -> ReferenceParameters:
        return ReferenceParameters(self.location, self.entry)

    @property
    def location(self) -> str:
        return f"{self.arrays.file.parent}: {self.tag}"


def read_runs(folder: Path, arrays: ReferenceArrays) -> list[RecordedRun]:
    """Every generation of meta.json. Raises CheckpointError if it and the arrays do not match."""
    meta = read_object(folder / "meta.json")
    family, entries = meta.get("family"), meta.get("generations")
    if not isinstance(family, str) or family not in EXTRA_ARRAYS:
        raise CheckpointError(
            f"{folder}: meta.json: family is {family!r}; known: {', '.join(EXTRA_ARRAYS)}"
        )
    if not isinstance(entries, list) or not entries:
        raise CheckpointError(f"{folder}: meta.json lists no generations")
    runs = [_parse_run(folder, family, entry, arrays) for entry in entries]
    tags = [run.tag for run in runs]
    if len(set(tags)) < len(tags):
        raise CheckpointError(f"{folder}: meta.json lists a generation twice")
    _check_arrays(family, tags, arrays)
    _check_margins(folder, meta, runs)
    return runs


def _check_arrays(family: str, tags: list[str], arrays: ReferenceArrays) -> None:
    """Check that the family's arrays are present, and that each array has a generation."""
    for name in EXTRA_ARRAYS[family]:
        if name not in arrays.arrays:
            raise CheckpointError(f"{arrays.file}: {name} is missing")
    output_names = {f"gen_{tag}_{part}" for tag in tags for part in ("prompt", "out")}
    for name in arrays.arrays:
        belongs = any(name.startswith(f"gen_{tag}_") for tag in tags)
        if name.endswith(("_prompt", "_out")):  # one tag may be a prefix of another
            belongs = name in output_names
        if name.startswith("gen_") and not belongs:
            raise CheckpointError(f"{arrays.file}: {name} belongs to no generation of meta.json")


def _check_margins(folder: Path, meta: Mapping[str, object], runs: list[RecordedRun]) -> None:
    """A margin can excuse a run, so none may be smaller than the smallest of the set."""
    margins = {key: value for key, value in meta.items() if key.startswith("worst_margin")}
    closest = min(_margin_values(f"{folder}: meta.json", margins), default=0.0)
    for run in runs:
        if run.margin < closest:
            raise CheckpointError(
                f"{run.location}: margin {run.margin:.1e} is below the set's worst"
            )


def _parse_run(folder: Path, family: str, entry: object, arrays: ReferenceArrays) -> RecordedRun:
    if not isinstance(entry, dict) or not isinstance(entry.get("tag"), str):
        raise CheckpointError(f"{folder}: meta.json: a generation without a tag")
    tag = entry["tag"]
    prompts, outputs = (_rows(arrays, f"gen_{tag}_{part}") for part in ("prompt", "out"))
    if arrays.arrays[f"gen_{tag}_prompt"].ndim != arrays.arrays[f"gen_{tag}_out"].ndim:
        raise CheckpointError(
            f"{arrays.file}: {tag}: prompt and out have different numbers of axes"
        )
    if len(prompts) != len(outputs):
        raise CheckpointError(
            f"{arrays.file}: {tag}: {len(prompts)} prompts, {len(outputs)} outputs"
        )
    if entry.get("n_out", len(outputs[0])) != len(outputs[0]):
        raise CheckpointError(
            f"{folder}: {tag}: n_out is {entry['n_out']}, of {len(outputs[0])} ids"
        )
    return RecordedRun(tag, family, entry, prompts, outputs, arrays)


def _margin_values(location: str, fields: Mapping[str, object]) -> list[float]:
    margins = []
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise CheckpointError(f"{location}: {name} is {value!r}, not a margin")
        margins.append(float(value))
    return margins


def _rows(arrays: ReferenceArrays, name: str) -> list[list[int]]:
    array = arrays.arrays.get(name)
    axes = array.ndim if isinstance(array, np.ndarray) and array.ndim in (1, 2) else 1
    ids = arrays.integers(name, *arrays.shape(name, axes))
    return ids.reshape(-1, ids.shape[-1]).tolist()


@dataclass(frozen=True)
class ReferenceArrays:
    """The arrays of a reference.npz. Each getter raises CheckpointError for a malformed array."""

    file: Path
    arrays: dict[str, np.ndarray]

    @staticmethod
    def of(file: Path) -> ReferenceArrays:
        """Raises CheckpointError if the file cannot be read."""
        try:
            with (
                opened(file) as descriptor,
                os.fdopen(descriptor, "rb", closefd=False) as handle,
                np.load(handle, allow_pickle=False) as archive,
            ):
                return ReferenceArrays(file, {name: archive[name] for name in archive.files})
        except CheckpointError:
            raise
        except (OSError, EOFError, ValueError, BadZipFile, zlib.error, KeyError) as error:
            raise CheckpointError(f"{file}: not a readable npz file ({error})") from None

    def floats(self, name: str, *shape: int) -> Tensor:
        """Finite numbers of exactly this shape."""
        array = self._array(name, "f", shape)
        if not np.isfinite(array).all():
            raise CheckpointError(f"{self.file}: {name} contains values that are not finite")
        return torch.from_numpy(array)

    def integers(self, name: str, *shape: int) -> Tensor:
        return torch.from_numpy(self._array(name, "iu", shape).astype(np.int64))

    def booleans(self, name: str, *shape: int) -> Tensor:
        return torch.from_numpy(self._array(name, "b", shape))

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        shape = self._require(name).shape
        if len(shape) != axes or 0 in shape:
            raise CheckpointError(
                f"{self.file}: {name} has shape {list(shape)}, expected {axes} axes"
            )
        return shape

    def _array(self, name: str, kinds: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self._require(name)
        if array.shape != shape or array.dtype.kind not in kinds:
            raise CheckpointError(
                f"{self.file}: {name} is {array.dtype}{list(array.shape)}, "
                f"expected kind {kinds!r} and shape {list(shape)}"
            )
        return array

    def _require(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise CheckpointError(f"{self.file}: {name} is missing")
        return self.arrays[name]


@dataclass(frozen=True)
class ReferenceParameters:
    """A run's parameters, and the names that were read. A name that was never read is an error.

    Each getter raises CheckpointError for a missing or malformed parameter.
    """

    location: str
    values: Mapping[str, object]
    read_names: set[str] = field(default_factory=set)

    def integer(self, name: str, default: int | None = None) -> int:
        return self._typed(name, default, int, "a whole number")

    def number(self, name: str, default: float | None = None) -> float:
        value = self._typed(name, default, (int, float), "a number")
        if not math.isfinite(value):
            raise self._error(name, value, "; it must be finite")
        return float(value)

    def threshold(self, name: str, default: float | None = None) -> float:
        """A confidence threshold, clamped to between ``MIN_CONFIDENCE`` and 1."""
        return min(max(self.number(name, default), MIN_CONFIDENCE), 1.0)

    def allow_only(self, name: str, *supported: object) -> None:
        """Raises for another value, which would change the loop. Absent means the first value."""
        value = self._get(name, supported[0], required=False)
        if value not in supported:
            raise self._error(name, value, f"; supported: {' or '.join(map(repr, supported))}")

    def flag(self, name: str, default: bool) -> bool:
        return self._typed(name, default, bool, "true or false")

    def choice(self, name: str, known: Mapping[str, object], default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self._error(name, value, f"; known: {', '.join(known)}")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids; empty if absent."""
        value = self._get(name, [])
        items = value if isinstance(value, list) else [value]
        ids = tuple(i for i in items if isinstance(i, int) and not isinstance(i, bool))
        if len(ids) < len(items):
            raise self._error(name, value, ", not token ids")
        return ids

    def items(self, name: str) -> list[object]:
        return self._typed(name, None, list, "a list")

    def section(self, name: str, *, required: bool = False) -> ReferenceParameters:
        values = self._typed(name, None if required else {}, dict, "an object")
        return ReferenceParameters(f"{self.location}: {name}", values)

    def has(self, name: str) -> bool:
        self.read_names.add(name)
        return self.values.get(name) is not None

    def check_unknown_names(self) -> None:
        if unknown := sorted(set(self.values) - self.read_names):
            raise CheckpointError(
                f"{self.location}: unknown parameter {', '.join(map(repr, unknown))}"
            )

    def _typed(self, name: str, default: object, kinds: Any, description: str) -> Any:
        """A parameter of one of these types; a bool is not a number."""
        value = self._get(name, default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise self._error(name, value, f", not {description}")
        return value

    def _get(self, name: str, default: object, *, required: bool = True) -> object:
        self.read_names.add(name)
        value = self.values.get(name)
        value = default if value is None else value
        if value is None and required:
            raise CheckpointError(f"{self.location}: {name} is missing")
        return value

    def _error(self, name: str, value: object, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.location}: {name} is {value!r}{reason}")
