"""Masked attention for short rows: one row's scores fit the cache, so each row is done at a time.

Shapes: B rows, h heads (query heads equal key heads), L positions, D head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v, [B, h, L, D]; mask [B, 1, L, L] additive, fp32."""
    return _Attention.apply(q, k, v, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: BackwardCFunction, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mixed = torch.empty_like(v)
        chances = q.new_empty(*q.shape[:3], q.shape[2])  # [B, h, L, L]
        scale = q.shape[-1] ** -0.5
        for row in range(len(q)):
            scores = torch.add(mask[row], torch.bmm(q[row], k[row].mT), alpha=scale)
            chances[row] = torch.softmax(scores, -1)
            torch.bmm(chances[row], v[row], out=mixed[row])
        ctx.save_for_backward(q, k, v, chances)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: BackwardCFunction, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        q, k, v, chances = saved
        slope_q, slope_k, slope_v = (torch.empty_like(t) for t in (q, k, v))
        scale = q.shape[-1] ** -0.5
        for row in range(len(q)):
            p = chances[row]
            torch.bmm(p.mT, grad[row], out=slope_v[row])
            slope = torch.bmm(grad[row], v[row].mT)
            slope = torch.ops.aten._softmax_backward_data(slope, p, -1, p.dtype).mul_(scale)
            torch.bmm(slope, k[row], out=slope_q[row])
            torch.bmm(slope.mT, q[row], out=slope_k[row])
        return slope_q, slope_k, slope_v, None
