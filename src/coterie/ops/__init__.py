"""The operations of a forward pass: one contract each, and the choice of the implementation.

``reference`` defines every result: plain torch, correct on any device. Faster implementations have
the same name and signature (``cpu``: C++, ``triton``: GPU); tests compare them by value.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from coterie.ops import cpu, grouped_gemm, packed_layout, reference
from coterie.ops.packed_layout import unpack
from coterie.ops.reference import top_ids, top_mask
from coterie.ops.triton_ops import kernels_for
from coterie.quantization import FORMATS, QTensor
from coterie.values import (
    Activation,
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
    "activate_and_mul",
    "add_rms_norm",
    "fused_attention",
    "fused_attention_layer",
    "gated_mlp",
    "linear",
    "pack",
    "prepare",
    "prepare_matrix",
    "rms_norm",
    "route",
    "run_experts",
    "summarize_logits",
    "top_ids",
    "top_mask",
    "unpack",
    "vote_weights",
]


def route(scores: Scores, rule: CoresetRule | None, vote_weight: Tensor | None) -> Routing | None:
    """Elects the coreset, selects each token's experts in it and weighs them, in one kernel.

    ``rule`` None runs the unmodified model. ``vote_weight`` [S, N] fp32 >= 0 is the weight of each
    token's vote, with a positive weight in every row; None: all 1. The result equals that of
    ``routing.route`` in plain torch: ids, used and coreset reuse exactly, weights to rounding. A
    GPU computes its own probabilities, and their last bits may change a choice.

    Returns None where no kernel supports the inputs: previous coresets on a GPU, or NaN or infinite
    logits on a CPU.
    """
    if (gpu := kernels_for(scores.logits)) is not None:
        return gpu.route(scores, rule, vote_weight)
    is_on_cpu = scores.logits.device.type == "cpu"
    return cpu.route(scores, rule, vote_weight) if is_on_cpu else None


def vote_weights(
    voters: Tensor | None, voter_filter: Tensor | None, *, invert_filter: bool = False
) -> Tensor:
    """Weight of each token's vote, [S, N] fp32: ``voters`` times ``voter_filter``, both >= 0.

    A row without a voter after filtering falls back to ``voters``; a row without any voter has all
    of its tokens vote. At least one argument is not None. With ``invert_filter`` the filter, a bool
    mask, marks the tokens that do not vote.
    """
    template = voters if voter_filter is None else voter_filter
    if template is not None and (gpu := kernels_for(template)) is not None:
        return gpu.vote_weights(voters, voter_filter, invert_filter=invert_filter)
    return reference.vote_weights(voters, voter_filter, invert_filter=invert_filter)


def run_experts(x: Tensor, routing: Routing, slab: Slab, activation: Activation = "silu") -> Tensor:
    """Weighted sum of the gated experts in ``slab``: x [T, H] -> [T, H], always fp32.

    Ids of -1 and experts absent from the slab contribute nothing, so the results of a layer's slabs
    add up. A slab on another device is computed there; inputs and output are copied.
    """
    if (slab_device := slab.gate_up.device) != x.device:
        ids, weights = routing.topk_ids.to(slab_device), routing.topk_weights.to(slab_device)
        slab_routing = Routing(ids, weights, routing.used.to(slab_device), ids)
        return run_experts(x.to(slab_device), slab_routing, slab, activation).to(x.device)
    if isinstance(slab.gate_up, PackedExperts):
        return cpu.run_experts(x, routing, slab, activation)
    if x.device.type == "cpu" and grouped_gemm.supports(x, slab):
        return grouped_gemm.run_experts(x, routing, slab, activation)
    if (gpu := kernels_for(x)) is not None and gpu.supports_experts(x, slab):
        return gpu.run_experts(x, routing, slab, activation)
    return reference.run_experts(x, routing, slab, activation)


def linear(x: Tensor, weight: Matrix, *, dtype: torch.dtype | None = None) -> Tensor:
    """x [..., k] times the transpose of weight [rows, k] -> [..., rows], in ``dtype`` or x's own.

    Computed in the weight's precision with fp32 sums, whatever the precision of x. The product is
    a float. For a weight in 8 bits the CPU kernels round x to 8 bits too, in groups of 32.
    """
    dtype = x.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise ValueError(f"a product in {dtype}; use a float")
    if isinstance(weight, PackedMatrix):
        return cpu.linear(x, weight, dtype)
    return reference.linear(x, weight, dtype)


def fused_attention(
    qkv: Tensor, norms: tuple[Tensor, Tensor], queries: QueryPositions, kv: LayerKV, epsilon: float
) -> Tensor | None:
    """Attention from projections to output heads in one kernel; None without such a kernel.

    qkv [B, W, heads + 2 kv_heads, D]. Queries and keys are RMS-normalised (``norms`` [D] each) and
    rotated; keys and values are written into ``kv``; the result is [B, W, heads, D]. The same
    computation in plain torch is ``model.attention``.
    """
    if (gpu := kernels_for(qkv)) is not None:
        if gpu.supports_attention(qkv, kv):
            return gpu.fused_attention(qkv, norms, queries, kv, epsilon)
    elif cpu.supports_attention(qkv):
        return cpu.fused_attention(qkv, norms, queries, kv, epsilon)
    return None


def fused_attention_layer(
    x: Tensor,
    weights: tuple[Matrix, Matrix],
    norms: tuple[Tensor, Tensor],
    *,
    queries: QueryPositions,
    kv: LayerKV,
    epsilon: float,
) -> Tensor | None:
    """QKV projection, ``fused_attention`` and output projection in one call; None without a kernel.

    x [B, W, H] -> [B, W, H]. ``weights`` are the fused QKV projection and the output projection.
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
    if (gpu := kernels_for(x)) is not None and gpu.supports_rms_norm(x, weight):
        return gpu.rms_norm(x, weight, epsilon)
    return reference.rms_norm(x, weight, epsilon)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x + residual (same shape and dtype), and its ``rms_norm``."""
    if cpu.supports_rms_norm(x, weight) and residual.dtype == x.dtype and residual.shape == x.shape:
        return cpu.add_rms_norm(x, residual, weight, epsilon)
    total = x + residual
    return total, rms_norm(total, weight, epsilon)


def activate_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """activation(first half) * second half of [..., 2 I] -> [..., I]."""
    if activation == "silu" and (gpu := kernels_for(gate_up)) is not None:
        return gpu.silu_and_mul(gate_up)
    return reference.activate_and_mul(gate_up, activation)


def gated_mlp(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    residual: Tensor | None = None,
    *,
    activation: Activation = "silu",
) -> Tensor:
    """A gated network, x [..., H] -> [..., H], plus ``residual`` (fp32, same number of elements).

    Adding the residual may round once or twice, depending on the implementation.
    """
    fits_kernel = x.dtype == torch.bfloat16 and activation == "silu"
    if fits_kernel and isinstance(gate_up, PackedMatrix) and isinstance(down, PackedMatrix):
        return cpu.swiglu(x, gate_up, down, residual)
    out = linear(activate_and_mul(linear(x, gate_up), activation), down)
    return out if residual is None else residual.to(x.dtype).view_as(out) + out


def summarize_logits(logits: Tensor, mask_id: int) -> LogitsSummary:
    """Argmax, argmax without ``mask_id`` (NO_MASK: none) and logsumexp of each row of logits."""
    if cpu.supports_logits_summary(logits):
        return cpu.summarize_logits(logits, mask_id)
    if logits.dtype == torch.float32 and (gpu := kernels_for(logits)) is not None:
        return gpu.summarize_logits(logits, mask_id)
    return reference.summarize_logits(logits, mask_id)


def prepare_matrix(weight: Tensor | QTensor, *, release_source: bool = False) -> Matrix:
    """The matrix in the fastest layout for ``linear`` on its device; see ``prepare``."""
    if cpu.can_pack_matrix(weight) and cpu.is_available():
        return cpu.pack_matrix(weight, release_source=release_source)
    return weight


def prepare(slab: Slab, *, release_source: bool = False) -> Slab:
    """The experts in the fastest layout for their device; the source memory is no longer needed.

    With ``release_source`` the source memory is freed expert by expert; it must have no other user.
    """
    if cpu.packed_format(slab) is not None and cpu.is_available():
        return cpu.pack(slab, release_source=release_source)
    gate_up = slab.gate_up
    if gate_up.device.type == "cpu" and isinstance(gate_up, QTensor) and cpu.is_available():
        _warn_slow_format(str(gate_up.format))
    return slab


def pack(slab: Slab) -> Slab:
    """The experts in the packed layout; the same bytes with and without the compiled kernels.

    Raises ValueError for formats that the layout does not support: floats other than fp32 and bf16,
    and other group sizes.
    """
    if cpu.packed_format(slab) is not None and cpu.is_available():
        return cpu.pack(slab)
    return packed_layout.pack(slab)


@cache
def _warn_slow_format(format_name: str) -> None:
    """Logs once per format that no kernel supports it."""
    logging.getLogger("coterie").warning(
        "Experts in %s run on PyTorch alone, which is many times slower; the CPU kernels support "
        "bf16 and %s",
        format_name,
        " and ".join(str(format_) for format_ in FORMATS.values()),
    )
