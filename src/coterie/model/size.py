"""Parameter counts and memory of a model, computed from its spec."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from coterie.model.spec import ModelSpec
from coterie.model.weights import expert_bytes, weight_bytes, weight_shapes


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts, and bytes in a given dtype.

    The router is counted in fp32, quantised experts in their format.
    """

    parameters: int
    active_parameters: int  # used by one token
    bytes: int  # all weights
    expert_bytes: int  # one routed expert
    layer_expert_bytes: int  # all routed experts of one layer
    kv_bytes_per_token: int  # keys and values of one position


def model_size(spec: ModelSpec, dtype: torch.dtype) -> ModelSize:
    """The size of a model of this spec in ``dtype``."""
    parameters = sum(prod(shape) for shape in weight_shapes(spec).values())
    inactive = spec.router.experts - spec.router.k
    one_expert_bytes = expert_bytes(spec, dtype)
    return ModelSize(
        parameters=parameters,
        active_parameters=parameters - len(spec.moe_layers) * inactive * spec.expert_parameters,
        bytes=weight_bytes(spec, dtype),
        expert_bytes=one_expert_bytes,
        layer_expert_bytes=spec.router.experts * one_expert_bytes,
        kv_bytes_per_token=spec.kv_features * dtype.itemsize,
    )


def experts_that_fit(spec: ModelSpec, dtype: torch.dtype, *, memory: int, length: int) -> int:
    """Experts per layer that fit into ``memory`` bytes, besides other weights and one KV cache row.

    Returns all experts if the whole model fits, and -1 if not even the other weights fit.
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
