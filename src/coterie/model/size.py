"""What a model weighs, from its spec alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from coterie.model.spec import ModelSpec
from coterie.model.weights import bytes_kept, expert_bytes, shapes


@dataclass(frozen=True)
class Size:
    """Parameters are counts; bytes are in the dtype that was asked for, the router's in fp32,
    quantised experts as they are.
    """

    parameters: int
    active_parameters: int  # that one token passes through
    bytes: int  # all weights
    expert_bytes: int  # one routed expert
    layer_expert_bytes: int  # all routed experts of one layer
    cache_bytes: int  # keys and values of one position


def size(spec: ModelSpec, dtype: torch.dtype) -> Size:
    """What a model of this spec weighs in ``dtype``."""
    parameters = sum(prod(shape) for shape in shapes(spec).values())
    idle = spec.router.experts - spec.router.k
    expert = expert_bytes(spec, dtype)
    return Size(
        parameters=parameters,
        active_parameters=parameters - len(spec.moe_layers) * idle * spec.expert_parameters,
        bytes=bytes_kept(spec, dtype),
        expert_bytes=expert,
        layer_expert_bytes=spec.router.experts * expert,
        cache_bytes=2 * spec.layers * spec.kv_heads * spec.head_dim * dtype.itemsize,
    )


def experts_that_fit(spec: ModelSpec, dtype: torch.dtype, *, memory: int, length: int) -> int:
    """Experts of each layer that fit into ``memory`` bytes beside all else and one row of keys.

    All of them when the whole model fits; -1 when not even the rest does.
    """
    whole = size(spec, dtype)
    layers = len(spec.moe_layers)
    rest = whole.bytes - layers * whole.layer_expert_bytes + length * whole.cache_bytes
    if memory < rest:
        return -1
    if layers == 0:
        return spec.router.experts
    return min(spec.router.experts, (memory - rest) // (layers * whole.expert_bytes))
