"""Routed experts with a backward by hand: sort once, gather, multiply by group, gather back.

Shapes: T tokens, k experts each, R rows sorted by expert, E experts, I width, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

# Each expert's rows are filled up to a multiple of this: the library that multiplies bf16 keeps a
# compiled kernel per size, and would otherwise compile new ones at every step.
GRAIN = 32


class Order(NamedTuple):
    """Rows sorted by expert, each expert's run filled up to a multiple of ``GRAIN``."""

    source: Tensor  # [R] int64: the flat (token, choice) of each row; T*k where the row is a filler
    place: Tensor  # [T, k] int64: the row of each (token, choice)
    ends: Tensor  # [E] int32: where each expert's rows end
    counts: Tensor  # [E] int64, without fillers


def order(ids: Tensor, experts: int) -> Order:
    """Sort the choices ``ids`` [T, k] by expert."""
    flat = ids.flatten()
    sources = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=experts)
    filled = (counts + GRAIN - 1) // GRAIN * GRAIN
    ends = filled.cumsum(0)
    shift = (ends - filled) - (counts.cumsum(0) - counts)  # [E] fillers before each expert
    rows = torch.arange(len(flat), device=ids.device) + shift.repeat_interleave(counts)
    place = torch.empty_like(flat).scatter_(0, sources, rows)
    source = flat.new_full((int(ends[-1]),), len(flat)).scatter_(0, rows, sources)
    return Order(source, place.view_as(ids), ends.to(torch.int32), counts)


def run_experts(x: Tensor, weights: Tensor, ids: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of experts, [T, H], and how many rows each expert took, [E].

    ``matrices`` [E, 3, I, H]: gate, up, and down transposed. The products run in the type of ``x``;
    the sum over experts is returned in that type too.
    """
    rows = order(ids, matrices.shape[0])
    mixed = _Experts.apply(x, weights, matrices, rows.source, rows.place, rows.ends)
    return mixed, rows.counts


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: BackwardCFunction,
        x: Tensor,
        weights: Tensor,
        matrices: Tensor,
        source: Tensor,
        place: Tensor,
        ends: Tensor,
    ) -> Tensor:
        low = matrices.to(x.dtype)  # [E, 3, I, H]
        width = low.shape[2]
        token = (source // place.shape[1]).clamp_max(len(x) - 1)  # [R]
        gathered = x.index_select(0, token)  # [R, H]
        both = F.grouped_mm(gathered, low[:, :2].flatten(1, 2).mT, offs=ends)  # [R, 2I]
        # A filler has weight zero, which also keeps it out of every gradient.
        scale = F.pad(weights.flatten(), (0, 1)).index_select(0, source).to(x.dtype)[:, None]
        hidden = F.silu(both[:, :width]).mul_(both[:, width:]).mul_(scale)  # [R, I]
        rows = F.grouped_mm(hidden, low[:, 2], offs=ends)  # [R, H]
        kept = (gathered, both, scale, hidden, low, token, place, ends)
        ctx.save_for_backward(weights, matrices, *kept)
        return F.embedding_bag(place, rows, mode="sum")  # [T, H]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: BackwardCFunction, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        weights, matrices, gathered, both, scale, hidden, low, token, place, ends = saved
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
        return (
            F.embedding_bag(place, back, mode="sum"),
            slope_scale.index_select(0, place.flatten()).view_as(place).to(weights.dtype),
            slope_matrices.to(matrices.dtype),
            *[None] * 3,
        )
