"""What is loaded: a model's files, and the form that its weights take in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coterie.errors import OffloadError
from coterie.families import Family, ModelConfig, detect_family
from coterie.families.names import is_stacked, weight_map
from coterie.loading.free_memory import free_memory
from coterie.model.checkpoint import Checkpoint
from coterie.model.safetensors_file import TensorEntry
from coterie.model.spec import ModelSpec
from coterie.model.weight_loader import WeightLoader
from coterie.model.weights import TensorTarget, allocate, is_packed, weight_bytes

GIB = 1 << 30

ProgressCallback = Callable[[int, int], None]
"""Called with (bytes read, bytes in total)."""


def has_device_memory(device: torch.device) -> bool:
    """Whether the device computes from memory of its own, into which experts are copied."""
    return device.type == "cuda"


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk: its config, and the headers of its files; no weights are loaded."""

    config: ModelConfig
    family: Family
    spec: ModelSpec  # as stored
    checkpoint: Checkpoint
    targets: Mapping[str, TensorTarget]

    @staticmethod
    def open(folder: Path) -> ModelFolder:
        """Raises CoterieError unless config and files describe one model."""
        config = ModelConfig.of(folder / "config.json")
        family = detect_family(config)
        spec = family.read_spec(config)
        checkpoint = Checkpoint.of(folder).without(family.tensor_names.skipped)
        targets = weight_map(family.tensor_names, spec, stacked=is_stacked(checkpoint.tensors))
        checkpoint.check(targets)
        return ModelFolder(config, family, spec, checkpoint, targets)

    @property
    def path(self) -> Path:
        return self.checkpoint.folder

    def tensors(self) -> Iterator[tuple[str, Path, TensorEntry]]:
        """The weight, file and header entry of every tensor."""
        for file, entries in self.checkpoint.files.items():
            for name, entry in entries.items():
                yield self.targets[name].weight, file, entry

    def packed_experts(self) -> Iterator[tuple[int, Path, TensorEntry]]:
        """The layer, file and header entry of every tensor of packed experts."""
        for weight, file, entry in self.tensors():
            if is_packed(weight):
                yield int(weight.split(".")[1]), file, entry


@dataclass(frozen=True)
class LoadTarget:
    """A model on disk, and the form in which it is loaded."""

    model: ModelFolder
    spec: ModelSpec  # in memory
    dtype: torch.dtype
    device: torch.device

    @property
    def has_device_memory(self) -> bool:
        return has_device_memory(self.device)

    def load_weights(
        self,
        on_progress: ProgressCallback | None,
        *,
        experts: bool,
        absent_bytes: int = 0,
        host_experts: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Check free memory, allocate all weights and read them.

        Without ``experts``, the device gets no experts: they are read into ``host_experts``, or
        stay in their files. ``absent_bytes`` is what the device then needs less.
        """
        self._check_free_memory(weight_bytes(self.spec, self.dtype) - absent_bytes)
        weights = allocate(self.spec, self.dtype, self.device, experts=experts)
        if host_experts is not None:
            weights |= host_experts()
        skip_packed = not experts and host_experts is None
        loader = WeightLoader(self.model.spec, self.spec, weights, skip_packed=skip_packed)
        checkpoint = self.model.checkpoint
        checkpoint.load(self.model.targets, loader, _running_total(checkpoint.bytes, on_progress))
        return weights

    def _check_free_memory(self, needed_bytes: int) -> None:
        free_bytes = free_memory(self.device)
        if free_bytes is not None and needed_bytes > free_bytes:
            raise OffloadError(
                f"{self.model.path}: the weights need {needed_bytes / GIB:.1f} GiB, "
                f"{free_bytes / GIB:.1f} GiB are free on {self.device}"
            )


def _running_total(
    total_bytes: int, on_progress: ProgressCallback | None
) -> Callable[[int], None] | None:
    if on_progress is None:
        return None
    done_bytes = 0

    def on_bytes(size: int) -> None:
        nonlocal done_bytes
        done_bytes += size
        on_progress(done_bytes, total_bytes)

    return on_bytes
