"""The weights of a loaded model, which must not change while answers are generated from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coterie.checkpoints.source import find_folder
from coterie.errors import CheckpointError
from coterie.loading.load import Model
from coterie.model.checkpoint import Checkpoint

Stamp = tuple[int, int, int]  # size, time of the last change in ns, inode


@dataclass(frozen=True)
class ModelFiles:
    """The stamp of each file. It is mapped, so that writing to it changes the model."""

    stamps: Mapping[Path, Stamp]

    @staticmethod
    def of(model: Model) -> ModelFiles:
        """The weights of a model and of its low-precision fallback."""
        plan = model.placement.plan
        fallback = None if plan is None else plan.config.fallback_model
        folders = [model.folder, None if fallback is None else find_folder(fallback.folder)]
        paths = [file for folder in folders if folder for file in Checkpoint.of(folder).files]
        return ModelFiles({path: _stamp(path) for path in paths})

    def check_unchanged(self) -> None:
        """Raises CheckpointError for a changed file, and OSError for a missing one."""
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise CheckpointError(
                    f"{path}: the file was changed after the model was loaded; restore it, and "
                    "the same command continues"
                )


def _stamp(path: Path) -> Stamp:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino
