"""Attention over keys written by position, in one call of the kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from coterie.ops.cpu.kernels import OUTCOMES, built, ready
from coterie.ops.cpu.library import Attending
from coterie.values import KeyValues, Sight


def attends(qkv: Tensor) -> bool:
    """Whether ``attend`` takes it."""
    half = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[-1] % 2 == 0
    return half and ready()


def attend(
    qkv: Tensor, norms: tuple[Tensor, Tensor], sight: Sight, held: KeyValues, epsilon: float
) -> Tensor:
    """See ``ops.attend``. Rounds where the eager way does or later, sums in fp32."""
    rows, width, all_heads, dim = qkv.shape
    kv_heads = held.keys.shape[1]
    heads = all_heads - 2 * kv_heads
    if held.keys.stride() != held.values.stride() or held.keys.stride()[2:] != (dim, 1):
        raise ValueError("keys and values lie in memory otherwise than a cache's do")
    qkv, limits = qkv.contiguous(), sight.limits.to(torch.int32).contiguous()
    positions, cos, sin = (t.contiguous() for t in (sight.positions, sight.cos, sight.sin))
    out = torch.empty(rows, width, heads, dim, dtype=torch.bfloat16)
    found = built()
    call = Attending(
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
        threads=torch.get_num_threads(),
    )
    if outcome := found.handle.coterie_attend(found.isa(), ctypes.byref(call)):
        raise RuntimeError(f"attention could not run: {OUTCOMES[outcome]}")
    return out
