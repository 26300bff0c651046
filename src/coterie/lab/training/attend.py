"""Masked attention for short rows, one at a time: the scores of one row fit the CPU cache.

Shapes: B rows, h heads (query heads equal key heads), L positions, D head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D) + mask) v, [B, h, L, D]; mask [B, 1, L, L] additive, fp32."""
    return _MaskedAttention.apply(q, k, v, mask)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: BackwardCFunction, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        output = torch.empty_like(v)
        probs = q.new_empty(*q.shape[:3], q.shape[2])  # [B, h, L, L]
        scale = q.shape[-1] ** -0.5
        for row in range(len(q)):
            scores = torch.add(mask[row], torch.bmm(q[row], k[row].mT), alpha=scale)
            probs[row] = torch.softmax(scores, -1)
            torch.bmm(probs[row], v[row], out=output[row])
        ctx.save_for_backward(q, k, v, probs)
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: BackwardCFunction, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        q, k, v, probs = saved
        grad_q, grad_k, grad_v = (torch.empty_like(t) for t in (q, k, v))
        scale = q.shape[-1] ** -0.5
        for row in range(len(q)):
            p = probs[row]
            torch.bmm(p.mT, grad[row], out=grad_v[row])
            grad_scores = torch.bmm(grad[row], v[row].mT)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, p, -1, p.dtype).mul_(
                scale
            )
            torch.bmm(grad_scores, k[row], out=grad_q[row])
            torch.bmm(grad_scores.mT, q[row], out=grad_k[row])
        return grad_q, grad_k, grad_v, None
