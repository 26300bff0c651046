"""The tensors a transformer is built from: their names here, their shapes, their memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from coterie.model.spec import ModelSpec
from coterie.values import Slab


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor of this shape goes: a region of one of our weights."""

    target: str
    shape: tuple[int, ...]
    region: tuple[int | slice, ...] = ()


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every weight by name; ``layers.3.experts.gate_up`` and ``.down`` become the layer's slab."""
    found = {"embedding": (spec.vocabulary, spec.hidden), "norm": (spec.hidden,)}
    if not spec.tied:
        found["head"] = (spec.vocabulary, spec.hidden)
    for layer in range(spec.layers):
        for name, shape in (_attention(spec) | _feed_forward(spec, layer)).items():
            found[f"layers.{layer}.{name}"] = shape
    return found


def kept_wide(name: str) -> bool:
    """The router decides on small differences: its weights stay fp32 whatever the model's dtype."""
    return name.endswith((".gate", ".gate_bias"))


def bytes_kept(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Memory of all weights in this dtype."""
    return sum(
        prod(shape) * (4 if kept_wide(name) else dtype.itemsize)
        for name, shape in shapes(spec).items()
    )


def allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Uninitialised memory for every weight."""
    return {
        name: torch.empty(shape, dtype=torch.float32 if kept_wide(name) else dtype, device=device)
        for name, shape in shapes(spec).items()
    }


def slabs(spec: ModelSpec, weights: dict[str, Tensor]) -> dict[int, Slab]:
    """One slab per layer with experts, over the weights' own memory: expert e sits in slot e."""
    found = {}
    for layer in spec.moe_layers:
        gate_up = weights[f"layers.{layer}.experts.gate_up"]
        slot_of = torch.arange(spec.router.experts, device=gate_up.device)
        found[layer] = Slab(gate_up, weights[f"layers.{layer}.experts.down"], slot_of)
    return found


def _attention(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {
        "attention_norm": (spec.hidden,),
        "qkv": (spec.qkv_rows, spec.hidden),
        "query_norm": (spec.head_dim,),
        "key_norm": (spec.head_dim,),
        "out": (spec.hidden, spec.heads * spec.head_dim),
        "feed_forward_norm": (spec.hidden,),
    }


def _feed_forward(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    if not spec.moe[layer]:
        return _network("dense", spec.hidden, spec.dense_width)
    experts, width = spec.router.experts, spec.expert_width
    found: dict[str, tuple[int, ...]] = {"gate": (experts, spec.hidden)}
    if spec.expert_bias:
        found["gate_bias"] = (experts,)
    found["experts.gate_up"] = (experts, 2 * width, spec.hidden)
    found["experts.down"] = (experts, spec.hidden, width)
    if spec.shared_width:
        found |= _network("shared", spec.hidden, spec.shared_width)
    return found


def _network(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.gate_up": (2 * width, hidden), f"{name}.down": (hidden, width)}
