"""The contracts of every operation that may have a faster twin, and the one place that picks one.

``reference`` is the truth: plain torch, correct on any device. A faster version has the same name
and signature and is compared with it by value.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from coterie.ops import cpu, grouped_gemm, packed_layout, reference, triton_ops
from coterie.ops.packed_layout import unpack
from coterie.ops.reference import top_ids, top_mask
from coterie.quantization import FORMATS, QTensor
from coterie.values import (
    CoresetRule,
    LayerKV,
    LogitsSummary,
    Matrix,
    PackedExperts,
    PackedMatrix,
    QueryPositions,
    Routing,
    Scores,
    Slab,
)

__all__ = [
    "add_rms_norm",
    "fused_attention",
    "fused_attention_layer",
    "linear",
    "pack",
    "prepare",
    "prepare_matrix",
    "rms_norm",
    "route",
    "run_experts",
    "silu_and_mul",
    "summarize_logits",
    "swiglu",
    "top_ids",
    "top_mask",
    "unpack",
    "vote_weights",
]


def route(scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None) -> Routing | None:
    """Election, choice inside the coreset and weights by one kernel; None where there is none.

    Without a ``rule``, the unmodified model. ``voice`` [S, N] fp32 >= 0 is what each token's vote
    weighs, with a voter in every row (None: everybody 1). What it gives equals what
    ``routing.route`` makes of the same rule in plain torch: ids, used, own and what came of
    incumbents exactly, weights to rounding. Also None for logits on a CPU that are no numbers: who
    asks then finds out which. A GPU computes probabilities itself: what differs in the last bits
    there may decide otherwise; of incumbents its kernel knows nothing (None).
    """
    device = scores.logits.device.type
    if device == "cuda" and triton_ops.is_available():
        return triton_ops.route(scores, rule, vote_weight)
    return cpu.route(scores, rule, vote_weight) if device == "cpu" else None


def vote_weights(
    voters: Tensor | None, voter_filter: Tensor | None, *, invert_filter: bool = False
) -> Tensor:
    """What each token's vote weighs, [S, N] fp32: ``asked``, times ``narrowing``, both >= 0.

    A row that narrowing leaves without a voter keeps those asked; a row without these has all of
    its tokens vote. At least one of the two is given. ``opposite``: narrowing, a mask, names those
    who do not vote.
    """
    template = voters if voter_filter is None else voter_filter
    if template is not None and template.device.type == "cuda" and triton_ops.is_available():
        return triton_ops.vote_weights(voters, voter_filter, invert_filter)
    return reference.vote_weights(voters, voter_filter, invert_filter=invert_filter)


def run_experts(x: Tensor, routing: Routing, slab: Slab) -> Tensor:
    """Weighted sum of the SwiGLU experts that ``slab`` holds: x [T, H] -> [T, H], always fp32.

    Ids of -1 and experts absent from the slab add nothing, so the slabs of one layer add up. A slab
    on another device than x is computed there: what it needs goes once, and waits for x.
    """
    if (slab_device := slab.gate_up.device) != x.device:
        ids, weights = routing.topk_ids.to(slab_device), routing.topk_weights.to(slab_device)
        slab_routing = Routing(ids, weights, routing.used.to(slab_device), ids)
        return run_experts(x.to(slab_device), slab_routing, slab).to(x.device)
    if isinstance(slab.gate_up, PackedExperts):
        return cpu.run_experts(x, routing, slab)
    if x.device.type == "cpu" and grouped_gemm.supports(x, slab):
        return grouped_gemm.run_experts(x, routing, slab)
    if (
        x.is_cuda
        and triton_ops.is_available()
        and (out := triton_ops.run_experts(x, routing, slab)) is not None
    ):
        return out
    return reference.run_experts(x, routing, slab)


def linear(x: Tensor, weight: Matrix, *, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., k] times the transpose of weight [rows, k] -> [..., rows], in ``dtype`` or x's own.

    Computed in the weight's precision, whatever that of x; sums are fp32.
    """
    dtype = x.dtype if dtype is None else dtype
    if isinstance(weight, PackedMatrix):
        return cpu.linear(x, weight, dtype)
    return reference.linear(x, weight, dtype)


def fused_attention(
    qkv: Tensor, norms: tuple[Tensor, Tensor], queries: QueryPositions, kv: LayerKV, epsilon: float
) -> Tensor | None:
    """Attention from projections to mixed values by one kernel; None where there is none.

    qkv [B, W, heads + 2 kv_heads, D]: queries and keys are normed (``norms`` [D] each), turned by
    position, keys and values written into ``held``, and what every query sees is mixed, [B, W,
    heads, D]. What it equals is in ``model.attention``, in plain torch.
    """
    if qkv.is_cuda and triton_ops.is_available():
        return triton_ops.fused_attention(qkv, norms, queries, kv, epsilon)
    return (
        cpu.fused_attention(qkv, norms, queries, kv, epsilon)
        if cpu.supports_attention(qkv)
        else None
    )


def fused_attention_layer(
    x: Tensor,
    weights: tuple[Matrix, Matrix],
    norms: tuple[Tensor, Tensor],
    *,
    queries: QueryPositions,
    kv: LayerKV,
    epsilon: float,
) -> Tensor | None:
    """``attend`` between the products before and after it, x [B, W, H] -> [B, W, H], by one call;
    None where there is none. ``weights`` are those of queries, keys and values, and of the output.
    """
    qkv_proj, o_proj = weights
    if not isinstance(qkv_proj, PackedMatrix) or not isinstance(o_proj, PackedMatrix):
        return None
    if not cpu.supports_attention(x) or kv.keys.shape[-1] % 2:
        return None
    return cpu.fused_attention_layer(
        x, (qkv_proj, o_proj), norms, queries=queries, kv=kv, epsilon=epsilon
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) over the last axis, computed in fp32 and rounded before the weight multiplies."""
    if cpu.supports_rms_norm(x, weight):
        return cpu.rms_norm(x, weight, epsilon)
    if (
        x.is_cuda
        and triton_ops.is_available()
        and (out := triton_ops.rms_norm(x, weight, epsilon)) is not None
    ):
        return out
    return reference.rms_norm(x, weight, epsilon)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x + more, both of one shape and type, and its ``rms_norm``."""
    if cpu.supports_rms_norm(x, weight) and residual.dtype == x.dtype and residual.shape == x.shape:
        return cpu.add_rms_norm(x, residual, weight, epsilon)
    total = x + residual
    return total, rms_norm(total, weight, epsilon)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu of the first half of [..., 2 I] times the second, [..., I]."""
    if gate_up.is_cuda and triton_ops.is_available():
        return triton_ops.silu_and_mul(gate_up)
    return reference.silu_and_mul(gate_up)


def swiglu(x: Tensor, gate_up: Matrix, down: Matrix, residual: Tensor | None = None) -> Tensor:
    """``gated`` between two products: x [..., H] -> [..., H], added to ``beside`` (fp32, as many
    numbers) where that is given, which one rounding may do or two."""
    is_bf16 = x.dtype == torch.bfloat16
    if is_bf16 and isinstance(gate_up, PackedMatrix) and isinstance(down, PackedMatrix):
        return cpu.swiglu(x, gate_up, down, residual)
    out = linear(silu_and_mul(linear(x, gate_up)), down)
    return out if residual is None else residual.to(x.dtype).view_as(out) + out


def summarize_logits(logits: Tensor, mask_id: int) -> LogitsSummary:
    """What each row of logits [w, V] says, where ``mask`` is no answer."""
    if cpu.supports_logits_summary(logits):
        return cpu.summarize_logits(logits, mask_id)
    if logits.is_cuda and logits.dtype == torch.float32 and triton_ops.is_available():
        return triton_ops.summarize_logits(logits, mask_id)
    return reference.summarize_logits(logits, mask_id)


def prepare_matrix(weight: Tensor, *, release_source: bool = False) -> Matrix:
    """The same matrix as ``linear`` reads it fastest here; see ``prepare``."""
    return (
        cpu.pack_matrix(weight, release_source=release_source)
        if cpu.can_pack_matrix(weight) and cpu.is_available()
        else weight
    )


def prepare(slab: Slab, *, release_source: bool = False) -> Slab:
    """The same experts as they run fastest here; their old memory is not needed any more.

    ``spend``: nobody else has that memory, and it may be given back expert by expert meanwhile.
    """
    if cpu.packed_format(slab) is not None and cpu.is_available():
        return cpu.pack(slab, release_source=release_source)
    if (
        slab.gate_up.device.type == "cpu"
        and isinstance(slab.gate_up, QTensor)
        and cpu.is_available()
    ):
        _warn_slow_format(str(slab.gate_up.format))
    return slab


def pack(slab: Slab) -> Slab:
    """The same experts in panels, byte for byte alike with and without kernels; see ``panels``.

    Raises ValueError for experts that no panels hold: floats other than bf16, other groups.
    """
    if cpu.packed_format(slab) is not None and cpu.is_available():
        return cpu.pack(slab)
    return packed_layout.pack(slab)


@cache
def _warn_slow_format(format_name: str) -> None:
    """Says, once for each form of experts, that they are slow."""
    logging.getLogger("coterie").warning(
        "Experts in %s run on PyTorch alone, many times slower than need be: the kernels for CPUs "
        "take %s",
        format_name,
        " and ".join(str(format_) for format_ in FORMATS.values()),
    )
