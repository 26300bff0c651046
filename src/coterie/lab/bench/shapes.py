"""Shapes of the published models, for benchmarks without a download."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.errors import ConfigError
from coterie.families.diffusion_gemma import FAMILY as DIFFUSION_GEMMA
from coterie.families.family import Family
from coterie.families.llada2 import EDIT_IDS
from coterie.families.llada2 import FAMILY as LLADA2
from coterie.families.llada_moe import FAMILY as LLADA_MOE
from coterie.families.sdar_moe import FAMILY as SDAR_MOE
from coterie.model.spec import AttentionSpec, ModelSpec
from coterie.values import RouterSpec, Slab

DISTINCT_EXPERTS = 8  # random experts that are repeated to fill a layer


@dataclass(frozen=True)
class LayerShape:
    """A model's layer of experts, and the unique experts that a block of 32 uses in it."""

    name: str
    router: RouterSpec
    hidden: int
    width: int
    unique_experts: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def bytes(self) -> int:
        """Bytes of all experts."""
        return self.router.experts * 3 * self.hidden * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class ModelShape:
    """A model's shape.

    ``unique_experts`` is the number per layer that a block of 32 uses; ``betas`` are the coreset
    sizes at which the paper reports the model.
    """

    title: str
    family: Family
    spec: ModelSpec
    unique_experts: int
    betas: tuple[float, ...] = (0.15, 0.1)

    @property
    def policies(self) -> tuple[str, ...]:
        """The policies that are timed by default."""
        return ("vanilla", *(f"des-vote:beta={beta:g}" for beta in self.betas))

    @property
    def layer(self) -> LayerShape:
        s = self.spec
        return LayerShape(self.title, s.router, s.hidden, s.expert_width, self.unique_experts)

    def truncate(self, layers: int | None) -> ModelShape:
        """The shape with its first ``layers`` layers (None: all)."""
        max_layers = self.spec.layers
        if layers is None or layers == max_layers:
            return self
        if not 1 <= layers <= max_layers or not any(self.spec.moe[:layers]):
            min_layers = self.spec.moe.index(True) + 1
            raise ConfigError(
                f"`layers` is {layers} for {self.title}; must be {min_layers} to {max_layers}"
            )
        moe, attention = self.spec.moe[:layers], self.spec.layer_attention[:layers]
        spec = replace(self.spec, layers=layers, moe=moe, layer_attention=attention)
        return replace(self, spec=spec)


def find_shape(name: str) -> ModelShape:
    """The shape with a name; raises ConfigError for an unknown one."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]


def random_slab(shape: LayerShape, device: torch.device) -> Slab:
    """A few random experts, repeated; every copy has its own memory."""
    experts, hidden, width = shape.router.experts, shape.hidden, shape.width
    generator = torch.Generator().manual_seed(0)

    def random_weight(*size: int) -> Tensor:
        distinct = torch.randn(DISTINCT_EXPERTS, *size, generator=generator) * size[-1] ** -0.5
        distinct = distinct.to(device, shape.dtype)
        return distinct.repeat(-(-experts // DISTINCT_EXPERTS), 1, 1)[:experts]

    return Slab(
        gate_up=random_weight(2 * width, hidden),
        down=random_weight(hidden, width),
        slot_of=torch.arange(experts, device=device),
    )


_LLADA2_MINI = ModelSpec(
    vocabulary=157_184,
    hidden=2048,
    layers=20,
    heads=16,
    kv_heads=4,
    head_dim=128,
    rotary_dim=64,
    rope_theta=600_000.0,
    norm_epsilon=1e-6,
    dense_width=5120,
    expert_width=512,
    shared_width=512,
    moe=(False,) + (True,) * 19,
    router=RouterSpec(256, 8, "sigmoid", True, 2.5, groups=8, topk_groups=4, epsilon=1e-20),
    expert_bias=True,
    tie_embeddings=False,
    max_length=32_768,
)
_LLADA22 = replace(
    LLADA2,
    defaults=replace(
        LLADA2.defaults,
        unmask="joint-edit",
        edit_ids=(EDIT_IDS["delete_token_id"], EDIT_IDS["split_token_id"]),
    ),
)
_LLADA22_MINI = replace(
    _LLADA2_MINI,
    rope_theta=3e6,
    router=RouterSpec(256, 8, "sigmoid", True, 2.5, epsilon=1e-20, capacity=48),
    max_length=131_072,
)
_LLADA2_FLASH = replace(
    _LLADA2_MINI,
    hidden=4096,
    layers=32,
    heads=32,
    dense_width=9216,
    expert_width=1024,
    shared_width=1024,
    moe=(False,) + (True,) * 31,
)
_LLADA_MOE = replace(
    _LLADA2_MINI,
    layers=16,
    kv_heads=16,
    rotary_dim=128,
    rope_theta=50_000.0,
    norm_epsilon=1e-5,
    dense_width=0,
    expert_width=1024,
    shared_width=0,
    moe=(True,) * 16,
    router=RouterSpec(64, 8, "softmax", False),
    expert_bias=False,
    max_length=8192,
)
_SDAR = replace(
    _LLADA_MOE,
    vocabulary=151_936,
    layers=48,
    heads=32,
    kv_heads=4,
    rope_theta=1e6,
    norm_epsilon=1e-6,
    expert_width=768,
    moe=(True,) * 48,
    router=RouterSpec(128, 8, "softmax", True),
    max_length=40_960,
)
_GEMMA_SLIDING = AttentionSpec(8, 256, 256, 1e4, window=1024, scale=1.0, norms_values=True)
_GEMMA_FULL = AttentionSpec(
    2, 512, 512, 1e6, rope_angles=64, scale=1.0, norms_values=True, keys_are_values=True
)
_GEMMA = replace(
    _SDAR,
    vocabulary=262_144,
    hidden=2816,
    layers=30,
    heads=16,
    kv_heads=8,
    head_dim=256,
    rotary_dim=256,
    rope_theta=1e4,
    expert_width=704,
    shared_width=2112,
    moe=(True,) * 30,
    tie_embeddings=True,
    max_length=262_144,
    layer_attention=((_GEMMA_SLIDING,) * 5 + (_GEMMA_FULL,)) * 5,
    activation="gelu-tanh",
    embedding_scale=2816**0.5,
    logit_cap=30.0,
    parallel_dense=True,
    self_conditioning=2112,
    block=256,
)
_TINY = replace(
    _LLADA2_MINI,
    vocabulary=160,
    hidden=64,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rotary_dim=8,
    dense_width=96,
    expert_width=32,
    shared_width=32,
    moe=(False, True, True),
    router=RouterSpec(32, 4, "sigmoid", True, 2.5, groups=4, topk_groups=2, epsilon=1e-20),
    max_length=512,
)

# The paper counts unique experts of LLaDA2.0-mini and LLaDA-MoE. Other routers are assumed to be
# as skewed as LLaDA2.0-mini's.
SHAPES = {
    "llada2-mini": ModelShape("LLaDA2.0-mini", LLADA2, _LLADA2_MINI, unique_experts=84),
    "llada2.2-mini": ModelShape("LLaDA2.2-mini", _LLADA22, _LLADA22_MINI, unique_experts=45),
    "llada2-flash": ModelShape("LLaDA2.0-flash", LLADA2, _LLADA2_FLASH, unique_experts=84),
    "llada-moe": ModelShape("LLaDA-MoE", LLADA_MOE, _LLADA_MOE, 59, betas=(0.6, 0.4)),
    "sdar-moe": ModelShape("SDAR-MoE", SDAR_MOE, _SDAR, unique_experts=63),
    "diffusion-gemma": ModelShape("DiffusionGemma", DIFFUSION_GEMMA, _GEMMA, unique_experts=63),
    "tiny": ModelShape("Tiny", LLADA2, _TINY, unique_experts=18, betas=(0.25,)),  # for tests
}
PAPER_LAYERS = (SHAPES["llada2-mini"].layer, SHAPES["llada-moe"].layer)
"""The layers that the paper measures."""
