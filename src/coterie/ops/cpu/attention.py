"""Attention over cached keys, in one kernel call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
    call = AttentionCall.create(qkv.contiguous(), norms, queries, kv, epsilon)
    run_ops(call.args)
    return call.out


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
    call = AttentionCall.create(qkv, norms, queries, kv, epsilon)
    attended = call.out.flatten(2)
    out = empty_product(attended, weights[1], x.dtype)
    run_ops(matmul_args(x, weights[0], qkv_out), call.args, matmul_args(attended, weights[1], out))
    return out


@dataclass(frozen=True)
class AttentionCall:
    """The kernel arguments of one attention call, and the tensors that they point to."""

    args: AttentionArgs
    out: Tensor
    references: tuple[Tensor, ...]

    @staticmethod
    def create(
        qkv: Tensor,
        norms: tuple[Tensor, Tensor],
        queries: QueryPositions,
        kv: LayerKV,
        epsilon: float,
    ) -> AttentionCall:
        """Prepares the call. qkv [B, W, heads + 2 kv_heads, D] may be written later."""
        rows, width, all_heads, dim = qkv.shape
        kv_heads = kv.keys.shape[1]
        heads = all_heads - 2 * kv_heads
        if kv.keys.stride() != kv.values.stride() or kv.keys.stride()[2:] != (dim, 1):
            raise ValueError("keys and values do not have the strides of a KV cache")
        limits = queries.key_limits.to(torch.int32).contiguous()
        positions, cos = queries.positions.contiguous(), queries.cos.contiguous()
        sin = queries.sin.contiguous()
        out = torch.empty(rows, width, heads, dim, dtype=torch.bfloat16)
        args = AttentionArgs(
            qkv=qkv.data_ptr(),
            query_norm=norms[0].data_ptr(),
            key_norm=norms[1].data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            positions=positions.data_ptr(),
            cache_rows=kv.cache_rows.data_ptr(),
            limits=limits.data_ptr(),
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
            rotary_half=cos.shape[-1],
            kv_length=queries.kv_length,
        )
        references = (qkv, limits, positions, cos, sin, kv.cache_rows)
        return AttentionCall(args, out, references)
