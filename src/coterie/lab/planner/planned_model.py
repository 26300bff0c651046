"""The model that is planned: a published shape, or what a config.json describes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.checkpoints.source import CONFIG_FILES, EMBEDDED, find_folder
from coterie.errors import ConfigError
from coterie.families import ModelConfig, detect_family
from coterie.lab.bench.model import ExpertDtype
from coterie.lab.bench.routings import BLOCK_LENGTH, find_skew, mean_unique_experts
from coterie.lab.bench.shapes import SHAPES, ModelShape
from coterie.lab.machine import CPU
from coterie.loading.load import choose_dtype
from coterie.model.spec import ModelSpec

LARGE_COUNT = 128  # experts from which the coresets of LLaDA2.0-mini are planned
SMALL_BETAS = SHAPES["llada-moe"].betas
QUANTISED: tuple[ExpertDtype, ...] = ("int8", "int4")


@dataclass(frozen=True)
class PlannedModel:
    """A model by name; ``is_shape`` if it is the name of a shape and not of a checkpoint."""

    name: str
    shape: ModelShape
    is_shape: bool

    @staticmethod
    def find(name: str | None) -> PlannedModel:
        """The model of a shape, a folder or a hub id; None is the model in the package."""
        if name in SHAPES:
            return PlannedModel(name, SHAPES[name], is_shape=True)
        config = ModelConfig.of(find_folder(name, CONFIG_FILES) / "config.json")
        family = detect_family(config)
        spec = family.read_spec(config)
        if not spec.moe_layers:
            raise ConfigError(f"{name}: no layer has experts")
        known = _known_shape(spec)
        betas = SHAPES["llada2-mini"].betas if known is None else known.betas
        if known is None and spec.router.experts < LARGE_COUNT:
            betas = SMALL_BETAS
        unique = _assumed_experts(spec) if known is None else known.unique_experts
        shape = ModelShape(family.title, family, spec, unique, betas)
        return PlannedModel(EMBEDDED if name is None else name, shape, is_shape=False)

    @property
    def spec(self) -> ModelSpec:
        """The model's spec as it is stored."""
        return self.shape.spec

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.spec.block or self.shape.family.defaults.block

    @property
    def is_embedded(self) -> bool:
        return self.name == EMBEDDED

    @property
    def stored_format(self) -> ExpertDtype:
        """The format of the experts without conversion, on this machine's CPU."""
        if self.spec.expert_format is not None:
            return "int8" if self.spec.expert_format.bits == 8 else "int4"
        small = not self.is_shape and choose_dtype(None, self.spec, CPU) == torch.float32
        return "fp32" if small and not self.spec.panels else "bf16"

    @property
    def formats(self) -> tuple[ExpertDtype, ...]:
        """The formats to plan: as stored, or quantised from bf16. A small model needs no less."""
        stored = self.stored_format
        can_convert = stored == "bf16" and not self.spec.panels
        return (stored, *QUANTISED) if can_convert else (stored,)

    @property
    def source(self) -> str:
        """What the assumed number of experts of a block rests on."""
        return "published" if _known_shape(self.spec) else "as skewed as LLaDA2.0-mini's router"


def _known_shape(spec: ModelSpec) -> ModelShape | None:
    """A published shape with this router; its number of experts a block is known."""
    sizes = (spec.router.experts, spec.router.k, spec.router.capacity)
    for shape in SHAPES.values():
        router = shape.spec.router
        if (router.experts, router.k, router.capacity) == sizes:
            return shape
    return None


def _assumed_experts(spec: ModelSpec) -> int:
    mini = SHAPES["llada2-mini"]
    skew = find_skew(mini.spec.router, mini.unique_experts)
    return max(spec.router.k, round(mean_unique_experts(spec.router, BLOCK_LENGTH, skew, 8)))


def default_folder(name: str, format_name: str) -> str:
    """The folder that a converted model is written to by the commands of a plan."""
    return f"{Path(name.partition('@')[0]).name}-{format_name}"
