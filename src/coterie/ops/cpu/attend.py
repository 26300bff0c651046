"""Attention over keys written by position, in one call of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.ops.cpu.chain import follow
from coterie.ops.cpu.kernels import ready
from coterie.ops.cpu.library import Attending
from coterie.ops.cpu.linear import product, product_of
from coterie.values import KeyValues, PackedMatrix, Sight


def attends(qkv: Tensor) -> bool:
    """Whether ``attend`` takes it."""
    half = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[-1] % 2 == 0
    return half and ready()


def attend(
    qkv: Tensor, norms: tuple[Tensor, Tensor], sight: Sight, held: KeyValues, epsilon: float
) -> Tensor:
    """See ``ops.attend``. Rounds where the eager way does or later, sums in fp32."""
    looking = Looking.at(qkv.contiguous(), norms, sight, held, epsilon)
    follow(looking.work)
    return looking.out


def attention(
    x: Tensor,
    weights: tuple[PackedMatrix, PackedMatrix],
    norms: tuple[Tensor, Tensor],
    *,
    sight: Sight,
    held: KeyValues,
    epsilon: float,
) -> Tensor:
    """See ``ops.attention``."""
    x = x.detach().contiguous()
    heads = product_of(x, weights[0], x.dtype)
    qkv = heads.unflatten(-1, (-1, held.keys.shape[-1]))
    looking = Looking.at(qkv, norms, sight, held, epsilon)
    mixed = looking.out.flatten(2)
    out = product_of(mixed, weights[1], x.dtype)
    follow(product(x, weights[0], heads), looking.work, product(mixed, weights[1], out))
    return out


@dataclass(frozen=True)
class Looking:
    """The work of attention, and all memory that it names."""

    work: Attending
    out: Tensor
    kept: tuple[Tensor, ...]

    @staticmethod
    def at(
        qkv: Tensor, norms: tuple[Tensor, Tensor], sight: Sight, held: KeyValues, epsilon: float
    ) -> Looking:
        """Of qkv [B, W, heads + 2 kv_heads, D], which may be written later."""
        rows, width, all_heads, dim = qkv.shape
        kv_heads = held.keys.shape[1]
        heads = all_heads - 2 * kv_heads
        if held.keys.stride() != held.values.stride() or held.keys.stride()[2:] != (dim, 1):
            raise ValueError("keys and values lie in memory otherwise than a cache's do")
        limits = sight.limits.to(torch.int32).contiguous()
        positions, cos, sin = (t.contiguous() for t in (sight.positions, sight.cos, sight.sin))
        out = torch.empty(rows, width, heads, dim, dtype=torch.bfloat16)
        work = Attending(
            qkv=qkv.data_ptr(),
            query_norm=norms[0].data_ptr(),
            key_norm=norms[1].data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            positions=positions.data_ptr(),
            places=held.places.data_ptr(),
            limits=limits.data_ptr(),
            keys=held.keys.data_ptr(),
            values=held.values.data_ptr(),
            out=out.data_ptr(),
            row_stride=held.keys.stride(0),
            head_stride=held.keys.stride(1),
            epsilon=epsilon,
            scale=dim**-0.5,
            rows=rows,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            half=cos.shape[-1],
            reach=sight.reach,
        )
        kept = (qkv, limits, positions, cos, sin, held.places)
        return Looking(work, out, kept)
