"""The arrays of a reference folder, checked for presence, shape and dtype."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from coterie.errors import CheckpointError
from coterie.files import opened


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
