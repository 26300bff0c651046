"""Routed experts with a backward written by hand: sort once, gather, multiply by group, gather back.

Shapes: T tokens, k experts each, R = T*k rows sorted by expert, E experts, I width, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class Order(NamedTuple):
    """Rows sorted by expert, and the way back."""

    source: Tensor  # [R] int64: the flat (token, choice) that each sorted row came from
    token: Tensor  # [R] int64
    place: Tensor  # [T, k] int64: the sorted row of each (token, choice)
    ends: Tensor  # [E] int32: where each expert's rows end
    counts: Tensor  # [E] int64


def order(ids: Tensor, experts: int) -> Order:
    """Sort the choices ``ids`` [T, k] by expert."""
    source = torch.sort(ids.flatten(), stable=True).indices
    place = torch.empty_like(source)
    place[source] = torch.arange(len(source), device=ids.device)
    counts = torch.bincount(ids.flatten(), minlength=experts)
    ends = counts.cumsum(0).to(torch.int32)
    return Order(source, source // ids.shape[1], place.view_as(ids), ends, counts)


def run_experts(x: Tensor, weights: Tensor, ids: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of experts, [T, H], and how many rows each expert took, [E].

    ``matrices`` [E, 3, I, H]: gate, up, and down transposed. The products run in the type of ``x``;
    the sum over experts is returned in that type too.
    """
    rows = order(ids, matrices.shape[0])
    mixed = _Experts.apply(x, weights, matrices, rows.source, rows.token, rows.place, rows.ends)
    return mixed, rows.counts


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weights: Tensor,
        matrices: Tensor,
        source: Tensor,
        token: Tensor,
        place: Tensor,
        ends: Tensor,
    ) -> Tensor:
        low = matrices.to(x.dtype)  # [E, 3, I, H]
        width = low.shape[2]
        gathered = x.index_select(0, token)  # [R, H]
        both = F.grouped_mm(gathered, low[:, :2].flatten(1, 2).mT, offs=ends)  # [R, 2I]
        scale = weights.flatten().index_select(0, source).to(x.dtype)[:, None]  # [R, 1]
        hidden = F.silu(both[:, :width]).mul_(both[:, width:]).mul_(scale)  # [R, I]
        rows = F.grouped_mm(hidden, low[:, 2], offs=ends)  # [R, H]
        ctx.save_for_backward(gathered, both, scale, hidden, low, token, place, ends)
        ctx.kinds = weights.dtype, matrices.dtype
        return F.embedding_bag(place, rows, mode="sum")  # [T, H]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gathered, both, scale, hidden, low, token, place, ends = ctx.saved_tensors
        width = low.shape[2]
        rows = grad.index_select(0, token)  # [R, H]
        slope = F.grouped_mm(rows, low[:, 2].mT, offs=ends)  # [R, I], d / d(scaled hidden)
        gate, up = both[:, :width], both[:, width:]
        half = torch.sigmoid(gate)
        active = gate * half  # silu
        # The routing weight multiplies the hidden row: its slope is their inner product.
        slope_scale = (slope * active * up).sum(-1).float()  # [R]
        slope = slope * scale
        slopes = torch.empty_like(both)
        torch.mul(slope, active, out=slopes[:, width:])
        half = half.addcmul(active, 1 - half)  # silu'
        torch.mul(slope * up, half, out=slopes[:, :width])
        slope_matrices = torch.empty_like(low)
        slope_matrices[:, :2].copy_(
            F.grouped_mm(slopes.mT, gathered, offs=ends).unflatten(1, (2, width))
        )
        slope_matrices[:, 2].copy_(F.grouped_mm(hidden.mT, rows, offs=ends))
        back = F.grouped_mm(slopes, low[:, :2].flatten(1, 2), offs=ends)  # [R, H]
        weight_kind, matrix_kind = ctx.kinds
        return (
            F.embedding_bag(place, back, mode="sum"),
            slope_scale.index_select(0, place.flatten()).view_as(place).to(weight_kind),
            slope_matrices.to(matrix_kind),
            *[None] * 4,
        )
