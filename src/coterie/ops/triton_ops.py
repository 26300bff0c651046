"""Kernels for a GPU, where Triton is installed: nothing here imports it before it is needed."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from coterie.values import (
    CoresetRule,
    LayerKV,
    LogitsSummary,
    QueryPositions,
    Routing,
    Scores,
    Slab,
)


@cache
def is_available() -> bool:
    """Whether kernels can run; says so once where they cannot."""
    if find_spec("triton") is not None:
        return True
    logging.getLogger("coterie").warning(
        "Triton is not installed: on this GPU everything runs on PyTorch alone (pip install triton)"
    )
    return False


def route(scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None) -> Routing | None:
    """See ``ops.route``."""
    from coterie.ops.triton import route as by_kernel

    return by_kernel(scores, rule, vote_weight)


def vote_weights(voters: Tensor | None, voter_filter: Tensor | None, invert_filter: bool) -> Tensor:
    """See ``ops.voices``."""
    from coterie.ops.triton import vote_weights as by_kernel

    return by_kernel(voters, voter_filter, invert_filter=invert_filter)


def run_experts(x: Tensor, routing: Routing, slab: Slab) -> Tensor | None:
    """See ``ops.run_experts``; None for types that no kernel takes."""
    from coterie.ops.triton import experts

    return experts.run_experts(x, routing, slab) if experts.supports(x, slab) else None


def fused_attention(
    qkv: Tensor, norms: tuple[Tensor, Tensor], queries: QueryPositions, kv: LayerKV, epsilon: float
) -> Tensor | None:
    """See ``ops.attend``."""
    from coterie.ops.triton import attention

    supported = attention.supports_attention(qkv, kv)
    return attention.fused_attention(qkv, norms, queries, kv, epsilon) if supported else None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor | None:
    """See ``ops.rms_norm``; None for types that no kernel takes."""
    from coterie.ops.triton import elementwise

    return (
        elementwise.rms_norm(x, weight, epsilon)
        if elementwise.supports_rms_norm(x, weight)
        else None
    )


def summarize_logits(logits: Tensor, mask_id: int) -> LogitsSummary:
    """See ``ops.survey``: logits in fp32."""
    from coterie.ops.triton import elementwise

    return elementwise.summarize_logits(logits, mask_id)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See ``ops.gated``."""
    from coterie.ops.triton import elementwise

    return elementwise.silu_and_mul(gate_up)
