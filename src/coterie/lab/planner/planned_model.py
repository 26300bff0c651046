"""The model that is planned: a published shape, or what a config.json describes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from coterie.checkpoints.source import CONFIG_FILES, EMBEDDED, find_folder
from coterie.decoding.canvas import Block
from coterie.decoding.kv_schemes import ForwardPass, KVScheme, StepCounter, parse_kv_scheme
from coterie.errors import ConfigError
from coterie.families import ModelConfig, detect_family
from coterie.lab.bench.model import ExpertDtype
from coterie.lab.bench.routings import BLOCK_LENGTH, find_skew, mean_unique_experts
from coterie.lab.bench.shapes import SHAPES, ModelShape
from coterie.lab.machine import CPU
from coterie.loading.load import choose_dtype
from coterie.model.spec import ModelSpec
from coterie.quantization import parse_dense_format

LARGE_COUNT = 128  # experts from which the coresets of LLaDA2.0-mini are planned
SMALL_BETAS = SHAPES["llada-moe"].betas
BLOCKS_BEFORE, BLOCKS_AFTER = 7, 4  # of the block that is predicted: the middle of an answer
QUANTISED: tuple[ExpertDtype, ...] = ("int8", "int4")


@dataclass(frozen=True)
class PlannedModel:
    """A model by name; ``is_shape`` if it is the name of a shape and not of a checkpoint."""

    name: str
    shape: ModelShape
    is_shape: bool
    dense_dtype: str | None = None  # to quantise dense matrices to; None: as stored

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

    def with_dense(self, dense_dtype: str | None) -> PlannedModel:
        """The model with dense matrices of this format."""
        if dense_dtype is None:
            return self
        spec = replace(self.spec, dense_format=parse_dense_format(dense_dtype))
        return replace(self, shape=replace(self.shape, spec=spec), dense_dtype=dense_dtype)

    @property
    def spec(self) -> ModelSpec:
        """The model's spec, with experts as they are stored."""
        return self.shape.spec

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.spec.block or self.shape.family.defaults.block

    @property
    def kv_scheme(self) -> KVScheme:
        return parse_kv_scheme(self.shape.family.defaults.kv_cache)

    @property
    def middle_block(self) -> Block:
        return Block(BLOCKS_BEFORE, BLOCKS_BEFORE * self.block, (BLOCKS_BEFORE + 1) * self.block)

    def decode_passes(self, steps: int) -> Iterator[ForwardPass]:
        """The forwards that decode the middle block, as many tokens in each."""
        kv_scheme, block = self.kv_scheme, self.middle_block
        length = block.stop + BLOCKS_AFTER * self.block
        for step in range(steps):
            counter = StepCounter(BLOCKS_BEFORE * steps + step, step)
            yield kv_scheme.next_pass(block, length, counter)

    def window_tokens(self, steps: int) -> int:
        """Tokens of the narrowest forward that decodes: the block, and its surroundings if any."""
        return min(each.width for each in self.decode_passes(steps))

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
