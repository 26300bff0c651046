"""The published models as shapes: what can be timed without a download."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.families.family import Family
from coterie.families.llada2 import FAMILY as LLADA2
from coterie.families.llada_moe import FAMILY as LLADA_MOE
from coterie.families.sdar_moe import FAMILY as SDAR_MOE
from coterie.model.spec import ModelSpec
from coterie.naming import CoterieError
from coterie.values import RouterSpec, Slab

SEEDED = 8  # random experts that a large layer is filled with, over and over


@dataclass(frozen=True)
class Shape:
    """A published model's layer of experts, and the unique experts a block of 32 uses in it."""

    name: str
    router: RouterSpec
    hidden: int
    width: int
    unique: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def bytes(self) -> int:
        """Of all its experts."""
        return self.router.experts * 3 * self.hidden * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Published:
    """A whole model's shape. ``unique``: experts of a layer that a block of 32 uses together;
    ``betas``: shares of the experts at which the paper reports it."""

    title: str
    family: Family
    spec: ModelSpec
    unique: int
    betas: tuple[float, ...] = (0.15, 0.1)

    @property
    def policies(self) -> tuple[str, ...]:
        """What is timed where nothing else is asked."""
        return ("vanilla", *(f"des-vote:beta={beta:g}" for beta in self.betas))

    @property
    def layer(self) -> Shape:
        """Its layer of experts."""
        spec = self.spec
        return Shape(self.title, spec.router, spec.hidden, spec.expert_width, self.unique)

    def cut(self, layers: int | None) -> Published:
        """The same with its first so many layers only (None: all of them)."""
        most = self.spec.layers
        if layers is None or layers == most:
            return self
        if not 1 <= layers <= most or not any(self.spec.moe[:layers]):
            least = self.spec.moe.index(True) + 1
            raise CoterieError(f"{layers} layers of {self.title}; it takes {least} to {most}")
        return replace(self, spec=replace(self.spec, layers=layers, moe=self.spec.moe[:layers]))


def published(name: str) -> Published:
    """By its name on the command line; raises CoterieError for one that is not known."""
    if name not in SHAPES:
        raise CoterieError(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]


def random_slab(shape: Shape, device: torch.device) -> Slab:
    """Few random experts, over and over: every copy is read from its own memory all the same."""
    experts, hidden, width = shape.router.experts, shape.hidden, shape.width
    draw = torch.Generator().manual_seed(0)

    def filled(*size: int) -> Tensor:
        few = torch.randn(SEEDED, *size, generator=draw) * size[-1] ** -0.5
        few = few.to(device, shape.dtype)
        return few.repeat(-(-experts // SEEDED), 1, 1)[:experts]

    return Slab(
        gate_up=filled(2 * width, hidden),
        down=filled(hidden, width),
        slot_of=torch.arange(experts, device=device),
    )


_MINI = ModelSpec(
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
    router=RouterSpec(256, 8, "sigmoid", True, 2.5, groups=8, kept_groups=4, epsilon=1e-20),
    expert_bias=True,
    tied=False,
    max_length=32_768,
)
_FLASH = replace(
    _MINI,
    hidden=4096,
    layers=32,
    heads=32,
    dense_width=9216,
    expert_width=1024,
    shared_width=1024,
    moe=(False,) + (True,) * 31,
)
_MOE = replace(
    _MINI,
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
    _MOE,
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
_TINY = replace(
    _MINI,
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
    router=RouterSpec(32, 4, "sigmoid", True, 2.5, groups=4, kept_groups=2, epsilon=1e-20),
    max_length=512,
)

# The paper counted unique experts of LLaDA2.0-mini and LLaDA-MoE. Of flash and SDAR nobody has:
# their routers are taken to be as skewed as LLaDA2.0-mini's.
SHAPES = {
    "llada2-mini": Published("LLaDA2.0-mini", LLADA2, _MINI, unique=84),
    "llada2-flash": Published("LLaDA2.0-flash", LLADA2, _FLASH, unique=84),
    "llada-moe": Published("LLaDA-MoE", LLADA_MOE, _MOE, unique=59, betas=(0.6, 0.4)),
    "sdar-moe": Published("SDAR-MoE", SDAR_MOE, _SDAR, unique=63),
    "tiny": Published("Tiny", LLADA2, _TINY, unique=18, betas=(0.25,)),  # to try a command out
}
LARGE = (SHAPES["llada2-mini"].layer, SHAPES["llada-moe"].layer)
"""The layers that the paper measures."""
