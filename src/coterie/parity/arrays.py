"""The arrays of a reference folder, read strictly."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from coterie.naming import CoterieError


@dataclass(frozen=True)
class Arrays:
    """A reference.npz whose every array is asked for by name, shape and kind."""

    file: Path
    held: dict[str, np.ndarray]

    @staticmethod
    def of(file: Path) -> Arrays:
        """Raises CoterieError when the file cannot be read whole."""
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
                return Arrays(file, {name: archive[name] for name in archive.files})
        except FileNotFoundError:
            raise CoterieError(f"{file}: no such file") from None
        except (OSError, EOFError, ValueError, BadZipFile, zlib.error, KeyError) as error:
            raise CoterieError(f"{file}: not a readable npz file ({error})") from None

    def floats(self, name: str, *shape: int) -> Tensor:
        """Finite numbers of exactly this shape."""
        array = self._array(name, "f", shape)
        if not np.isfinite(array).all():
            raise CoterieError(f"{self.file}: {name} holds numbers that are not finite")
        return torch.from_numpy(array)

    def whole(self, name: str, *shape: int) -> Tensor:
        return torch.from_numpy(self._array(name, "iu", shape).astype(np.int64))

    def flags(self, name: str, *shape: int) -> Tensor:
        return torch.from_numpy(self._array(name, "b", shape))

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        found = self._held(name).shape
        if len(found) != axes or 0 in found:
            raise CoterieError(f"{self.file}: {name} has shape {list(found)}, expected {axes} axes")
        return found

    def _array(self, name: str, kinds: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self._held(name)
        if array.shape != shape or array.dtype.kind not in kinds:
            raise CoterieError(
                f"{self.file}: {name} is {array.dtype}{list(array.shape)}, "
                f"expected kind {kinds!r} and shape {list(shape)}"
            )
        return array

    def _held(self, name: str) -> np.ndarray:
        if name not in self.held:
            raise CoterieError(f"{self.file}: {name} is missing")
        return self.held[name]
