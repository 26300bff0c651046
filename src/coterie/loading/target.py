"""What is loaded: a model's files, and the form that its weights take in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.checkpoints.model_folder import ModelFolder
from coterie.errors import OffloadError
from coterie.files import ProgressCallback, running_total
from coterie.loading.free_memory import free_memory
from coterie.model.spec import ModelSpec
from coterie.model.weight_loader import WeightLoader
from coterie.model.weights import allocate, weight_bytes

GIB = 1 << 30


def has_device_memory(device: torch.device) -> bool:
    """Whether the device computes from memory of its own, into which experts are copied."""
    return device.type == "cuda"


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
        stay in their files. ``absent_bytes`` are those that the device then does not need.
        """
        self._check_free_memory(weight_bytes(self.spec, self.dtype) - absent_bytes)
        weights = allocate(self.spec, self.dtype, self.device, experts=experts)
        if host_experts is not None:
            weights |= host_experts()
        skip_packed = not experts and host_experts is None
        loader = WeightLoader(self.model.spec, self.spec, weights, skip_packed=skip_packed)
        checkpoint = self.model.checkpoint
        checkpoint.load(self.model.targets, loader, running_total(checkpoint.bytes, on_progress))
        return weights

    def _check_free_memory(self, needed_bytes: int) -> None:
        free_bytes = free_memory(self.device)
        if free_bytes is not None and needed_bytes > free_bytes:
            raise OffloadError(
                f"{self.model.path}: the weights need {needed_bytes / GIB:.1f} GiB, "
                f"{free_bytes / GIB:.1f} GiB are free on {self.device}"
            )
