"""Attention over cached keys, in one kernel call."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.checks import address, describe
from coterie.ops.cpu.library import AttentionArgs, is_available
from coterie.ops.cpu.linear import empty_product, matmul_args
from coterie.ops.cpu.op_chain import run_ops
from coterie.values import LayerKV, PackedMatrix, QueryPositions


def supports_attention(qkv: Tensor) -> bool:
    """Whether ``fused_attention`` supports these projections."""
    is_bf16 = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[-1] % 2 == 0
    return is_bf16 and is_available()


def fused_attention(
    qkv: Tensor, norms: tuple[Tensor, Tensor], queries: QueryPositions, kv: LayerKV, epsilon: float
) -> Tensor:
    """See ``ops.fused_attention``. Sums in fp32; rounds where plain torch does, or later."""
    args, out = attention_args(qkv.contiguous(), norms, queries, kv, epsilon)
    run_ops(args)
    return out


def fused_attention_layer(
    x: Tensor,
    weights: tuple[PackedMatrix, PackedMatrix],
    norms: tuple[Tensor, Tensor],
    *,
    queries: QueryPositions,
    kv: LayerKV,
    epsilon: float,
) -> Tensor:
    """See ``ops.fused_attention_layer``."""
    x = x.detach().contiguous()
    qkv_out = empty_product(x, weights[0], x.dtype)
    qkv = qkv_out.unflatten(-1, (-1, kv.keys.shape[-1]))
    args, heads_out = attention_args(qkv, norms, queries, kv, epsilon)
    attended = heads_out.flatten(2)
    out = empty_product(attended, weights[1], x.dtype)
    run_ops(matmul_args(x, weights[0], qkv_out), args, matmul_args(attended, weights[1], out))
    return out


def attention_args(
    qkv: Tensor, norms: tuple[Tensor, Tensor], queries: QueryPositions, kv: LayerKV, epsilon: float
) -> tuple[AttentionArgs, Tensor]:
    """The arguments and the output; qkv [B, W, heads + 2 kv_heads, D] may be written later."""
    rows, width, all_heads, dim = qkv.shape
    cache_size, kv_heads, capacity, _ = check_cache(kv, dim)
    heads, rotary_half = all_heads - 2 * kv_heads, queries.cos.shape[-1]
    if heads < 1 or heads % kv_heads or 2 * rotary_half > dim:
        raise ValueError(
            f"{all_heads} heads of {dim} with {kv_heads} KV heads and {rotary_half} rotations"
        )
    if not 1 <= queries.kv_length <= capacity:
        raise ValueError(f"{queries.kv_length} keys in a KV cache of {capacity} positions")
    limits = queries.key_limits.clamp(0, queries.kv_length).to(torch.int32).contiguous()
    positions, cos = queries.positions.contiguous(), queries.cos.contiguous()
    sin, bf16 = queries.sin.contiguous(), torch.bfloat16
    rotations = (rows, width, 1, rotary_half)
    out = torch.empty(rows, width, heads, dim, dtype=bf16)
    args = AttentionArgs(
        qkv=address(qkv, bf16, qkv.shape, "qkv"),
        query_norm=address(norms[0], bf16, (dim,), "query norm"),
        key_norm=address(norms[1], bf16, (dim,), "key norm"),
        cos=address(cos, torch.float32, rotations, "cos"),
        sin=address(sin, torch.float32, rotations, "sin"),
        positions=address(positions, torch.int64, (rows, width), "positions"),
        cache_rows=address(kv.cache_rows, torch.int64, (rows,), "cache rows"),
        limits=address(limits, torch.int32, (rows, width), "key limits"),
        keys=kv.keys.data_ptr(),
        values=kv.values.data_ptr(),
        out=out.data_ptr(),
        row_stride=kv.keys.stride(0),
        head_stride=kv.keys.stride(1),
        epsilon=epsilon,
        scale=dim**-0.5,
        rows=rows,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        rotary_half=rotary_half,
        kv_length=queries.kv_length,
        cache_size=cache_size,
        capacity=capacity,
    )
    args.tensors = (qkv, limits, positions, cos, sin, kv.cache_rows)  # kept alive with the struct
    return args, out


def check_cache(kv: LayerKV, dim: int) -> torch.Size:
    """The shape of the keys; raises for keys and values that are no KV cache of such heads."""
    for tensor in (kv.keys, kv.values):
        is_bf16 = tensor.is_cpu and tensor.dtype is torch.bfloat16 and tensor.dim() == 4
        if not is_bf16 or tensor.stride()[2:] != (dim, 1) or tensor.shape[-1] != dim:
            raise ValueError(f"a KV cache of heads of {dim} in bf16: {describe(tensor)}")
    if kv.keys.shape != kv.values.shape or kv.keys.stride() != kv.values.stride():
        raise ValueError("keys and values do not have the same shape and strides")
    return kv.keys.shape
