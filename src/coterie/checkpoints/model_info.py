"""The sizes of a model and the memory it needs, from its config.json alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.checkpoints.source import CONFIG_FILES, EMBEDDED, find_folder
from coterie.families import Family, ModelConfig, detect_family, eos_ids, mask_id
from coterie.keys import to_json
from coterie.model.size import ModelSize, experts_that_fit, model_size
from coterie.model.spec import UNQUANTISED, ModelSpec
from coterie.offload.capacity import format_bytes
from coterie.values import NO_MASK

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
    mask_id: int | None  # None: the model has none, or no file names one in the vocabulary
    eos_ids: tuple[int, ...]
    kv_length: int  # positions of the KV cache that ``fits`` includes, for one sequence
    fits: tuple[MemoryFit, ...]

    def to_dict(self) -> dict[str, object]:
        """The description as JSON; sizes are in bytes."""
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

    def describe(self) -> list[tuple[str, str]]:
        """Names and values, as text."""
        spec, size, router = self.spec, self.size, self.spec.router
        dtype = str(self.dtype).removeprefix("torch.")
        mask = "none" if self.mask_id is None else self.mask_id
        admitted = f", of {router.capacity} that a block of {router.block} admits"
        per_token = f"{router.k} a token{admitted if router.capacity else ''}"
        quantised = spec.expert_storage != UNQUANTISED
        return [
            ("model", self.name),
            ("family", f"{self.family.title} ({self.family.architecture})"),
            (
                "parameters",
                f"{size.parameters:,}, of which a token uses {size.active_parameters:,}",
            ),
            ("layers", f"{spec.layers}, of which {len(spec.moe_layers)} have experts"),
            ("experts", f"{router.experts} a layer, {per_token}"),
            ("hidden, expert, shared", f"{spec.hidden}, {spec.expert_width}, {spec.shared_width}"),
            *(("heads", text) for text in self._describe_heads()),
            *([("canvas", f"{spec.block} tokens")] if spec.block else []),
            ("vocabulary", f"{spec.vocabulary:,}"),
            ("mask id, end ids", f"{mask}, {' '.join(map(str, self.eos_ids)) or 'none'}"),
            *([("experts stored in", spec.expert_storage)] if quantised else []),
            (f"weights in {dtype}", f"{format_bytes(size.bytes)} ({size.bytes:,} bytes)"),
            ("one expert", f"{format_bytes(size.expert_bytes)} ({size.expert_bytes:,} bytes)"),
            ("a layer's experts", format_bytes(size.layer_expert_bytes)),
            ("keys and values", f"{format_bytes(size.kv_bytes_per_token)} a position"),
            *((f"in {format_bytes(fit.memory)}", self._describe_fit(fit)) for fit in self.fits),
        ]

    def _describe_heads(self) -> list[str]:
        """The heads of each kind of attention, with its layers if there are several kinds."""
        counts = Counter(self.spec.attention)
        lines = []
        for kind, count in counts.items():
            text = f"{self.spec.heads} of {kind.head_dim}, {kind.kv_heads} for keys and values"
            if len(counts) > 1:
                text += f", in {count} layer{'s' * (count > 1)}"
            lines.append(text + (f", which see {kind.window} positions" if kind.window else ""))
        return lines

    def _describe_fit(self, fit: MemoryFit) -> str:
        """How much of a model fits with the KV cache of one sequence."""
        num_experts = self.spec.router.experts
        if fit.experts < 0:
            return "does not fit, even without its experts"
        if fit.experts >= num_experts:
            return f"all of it, with a sequence of {self.kv_length} positions"
        return f"all but the experts, and {fit.experts} of {num_experts} experts a layer"


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
    mask = mask_id(config, family, spec.vocabulary)
    return ModelInfo(
        name=EMBEDDED if name is None else str(name),
        family=family,
        spec=spec,
        size=model_size(spec, dtype),
        dtype=dtype,
        mask_id=None if mask == NO_MASK else mask,
        eos_ids=eos_ids(config, family, spec.vocabulary),
        kv_length=kv_length,
        fits=tuple(
            MemoryFit(memory, experts_that_fit(spec, dtype, memory=memory, length=kv_length))
            for memory in memory_sizes
        ),
    )
