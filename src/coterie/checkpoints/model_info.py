"""The sizes of a model and the memory it needs, from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.checkpoints.source import CONFIG_FILES, EMBEDDED, find_folder
from coterie.families import Family, ModelConfig, detect_family, eos_ids, mask_id
from coterie.keys import to_json
from coterie.model.size import ModelSize, experts_that_fit, model_size
from coterie.model.spec import ModelSpec

GIB = 1 << 30
DEVICE_MEMORY_GIB = (8, 12, 16, 24, 32, 48, 80, 141)  # of common GPUs


@dataclass(frozen=True)
class MemoryFit:
    """The number of experts per layer that fit into ``memory`` bytes."""

    memory: int
    experts: int  # -1 if the weights other than experts are too large


@dataclass(frozen=True)
class ModelInfo:
    """The output of ``coterie inspect``."""

    name: str
    family: Family
    spec: ModelSpec
    size: ModelSize
    dtype: torch.dtype
    mask_id: int | None  # None: neither the config nor the family has one in the vocabulary
    eos_ids: tuple[int, ...]
    kv_length: int  # positions of the KV cache that ``fits`` includes, for one sequence
    fits: tuple[MemoryFit, ...]

    def to_dict(self) -> dict[str, object]:
        """As JSON; sizes in bytes."""
        spec, size = self.spec, self.size
        return {
            "model": self.name,
            "family": self.family.name,
            "architecture": self.family.architecture,
            "parameters": size.parameters,
            "active_parameters": size.active_parameters,
            "layers": spec.layers,
            "moe_layers": len(spec.moe_layers),
            "hidden": spec.hidden,
            "vocabulary": spec.vocabulary,
            "experts": spec.router.experts,
            "experts_per_token": spec.router.k,
            "expert_width": spec.expert_width,
            "shared_width": spec.shared_width,
            "mask_id": self.mask_id,
            "eos_ids": list(self.eos_ids),
            "dtype": str(self.dtype).removeprefix("torch."),
            "expert_format": None if spec.expert_format is None else to_json(spec.expert_format),
            "experts_packed": spec.panels,
            "bytes": size.bytes,
            "expert_bytes": size.expert_bytes,
            "layer_expert_bytes": size.layer_expert_bytes,
            "cache_bytes_per_position": size.kv_bytes_per_token,
            "fits": [{"memory": fit.memory, "experts_per_layer": fit.experts} for fit in self.fits],
        }


def inspect(
    name: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    kv_length: int = 2048,
    memory_sizes: tuple[int, ...] = tuple(gib * GIB for gib in DEVICE_MEMORY_GIB),
) -> ModelInfo:
    """Read only a model's config.json. Raises the same errors as loading does."""
    config = ModelConfig.of(find_folder(name, CONFIG_FILES) / "config.json")
    family = detect_family(config)
    spec = family.read_spec(config)
    kv_length = min(kv_length, spec.max_length)
    return ModelInfo(
        name=EMBEDDED if name is None else str(name),
        family=family,
        spec=spec,
        size=model_size(spec, dtype),
        dtype=dtype,
        mask_id=mask_id(config, family, spec.vocabulary),
        eos_ids=eos_ids(config, family, spec.vocabulary),
        kv_length=kv_length,
        fits=tuple(
            MemoryFit(memory, experts_that_fit(spec, dtype, memory=memory, length=kv_length))
            for memory in memory_sizes
        ),
    )
