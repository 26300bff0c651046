"""What a model weighs, from its spec alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from coterie.model.spec import ModelSpec
from coterie.model.weights import expert_bytes, weight_bytes, weight_shapes


@dataclass(frozen=True)
class ModelSize:
    """Parameters are counts; bytes are in the dtype that was asked for, the router's in fp32,
    quantised experts as they are.
    """

    parameters: int
    active_parameters: int  # that one token passes through
    bytes: int  # all weights
    expert_bytes: int  # one routed expert
    layer_expert_bytes: int  # all routed experts of one layer
    kv_bytes_per_token: int  # keys and values of one position


def model_size(spec: ModelSpec, dtype: torch.dtype) -> ModelSize:
    """What a model of this spec weighs in ``dtype``."""
    parameters = sum(prod(shape) for shape in weight_shapes(spec).values())
    inactive = spec.router.experts - spec.router.k
    one_expert_bytes = expert_bytes(spec, dtype)
    return ModelSize(
        parameters=parameters,
        active_parameters=parameters - len(spec.moe_layers) * inactive * spec.expert_parameters,
        bytes=weight_bytes(spec, dtype),
        expert_bytes=one_expert_bytes,
        layer_expert_bytes=spec.router.experts * one_expert_bytes,
        kv_bytes_per_token=2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize,
    )


def experts_that_fit(spec: ModelSpec, dtype: torch.dtype, *, memory: int, length: int) -> int:
    """Experts of each layer that fit into ``memory`` bytes beside all else and one row of keys.

    All of them when the whole model fits; -1 when not even the rest does.
    """
    total = model_size(spec, dtype)
    layers = len(spec.moe_layers)
    other_bytes = (
        total.bytes - layers * total.layer_expert_bytes + length * total.kv_bytes_per_token
    )
    if memory < other_bytes:
        return -1
    if layers == 0:
        return spec.router.experts
    return min(spec.router.experts, (memory - other_bytes) // (layers * total.expert_bytes))
