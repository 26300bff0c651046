"""A model on disk, described by its config and the headers of its files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coterie.families import Family, ModelConfig, detect_family
from coterie.families.names import is_stacked, weight_map
from coterie.model.checkpoint import Checkpoint
from coterie.model.safetensors_file import TensorEntry
from coterie.model.spec import ModelSpec
from coterie.model.weights import TensorTarget, is_packed
from coterie.ops.packed_layout import slab_of_packed
from coterie.values import Slab


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that was checked; no weights are loaded."""

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

    def packed_slab(self, packed: Tensor, slot_of: Tensor) -> Slab:
        """A slab over packed experts [n, bytes of an expert] of this model."""
        hidden, width = self.spec.hidden, self.spec.expert_width
        return slab_of_packed(packed, self.spec.panel_kind, slot_of, hidden=hidden, width=width)
