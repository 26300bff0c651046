"""Routed experts with a custom backward: sort by expert, gather, grouped matmuls, gather back.

Shapes: T tokens, k experts each, R rows sorted by expert, E experts, I width, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

# Each expert's rows are padded to a multiple of this. The bf16 matmul library compiles a kernel per
# size, and would otherwise compile new ones in every step.
ROW_ALIGNMENT = 32


class ExpertOrder(NamedTuple):
    """Rows sorted by expert, padded to a multiple of ``ROW_ALIGNMENT`` per expert."""

    pair_index: Tensor  # [R] int64: the flat (token, choice) of each row; T*k for padding
    row_index: Tensor  # [T, k] int64: the row of each (token, choice)
    expert_ends: Tensor  # [E] int32: the end of each expert's rows
    counts: Tensor  # [E] int64, without padding


def sort_by_expert(ids: Tensor, experts: int) -> ExpertOrder:
    """Sort the expert ids [T, k] of all tokens by expert."""
    flat = ids.flatten()
    sorted_pairs = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)  # [E] padding rows before each expert
    rows = torch.arange(len(flat), device=ids.device) + shift.repeat_interleave(counts)
    row_index = torch.empty_like(flat).scatter_(0, sorted_pairs, rows)
    pair_index = flat.new_full((int(ends[-1]),), len(flat)).scatter_(0, rows, sorted_pairs)
    return ExpertOrder(pair_index, row_index.view_as(ids), ends.to(torch.int32), counts)


def run_experts(x: Tensor, weights: Tensor, ids: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of experts [T, H], and the number of rows of each expert [E].

    ``matrices`` [E, 3, I, H]: gate, up, and down transposed. Matmuls run in the dtype of ``x``.
    """
    *order, counts = sort_by_expert(ids, matrices.shape[0])
    return _RoutedExperts.apply(x, weights, matrices, *order), counts


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes by position)
        ctx: BackwardCFunction,
        x: Tensor,
        weights: Tensor,
        matrices: Tensor,
        pair_index: Tensor,
        row_index: Tensor,
        expert_ends: Tensor,
    ) -> Tensor:
        typed_matrices = matrices.to(x.dtype)  # [E, 3, I, H]
        width = typed_matrices.shape[2]
        token = (pair_index // row_index.shape[1]).clamp_max(len(x) - 1)  # [R]
        gathered = x.index_select(0, token)  # [R, H]
        gate_up = F.grouped_mm(
            gathered, typed_matrices[:, :2].flatten(1, 2).mT, offs=expert_ends
        )  # [R, 2I]
        # A padding row has weight 0, which also keeps it out of every gradient.
        scale = F.pad(weights.flatten(), (0, 1)).index_select(0, pair_index).to(x.dtype)[:, None]
        hidden = F.silu(gate_up[:, :width]).mul_(gate_up[:, width:]).mul_(scale)  # [R, I]
        rows = F.grouped_mm(hidden, typed_matrices[:, 2], offs=expert_ends)  # [R, H]
        to_save = (gathered, gate_up, scale, hidden, typed_matrices, token, row_index, expert_ends)
        ctx.save_for_backward(weights, matrices, *to_save)
        return F.embedding_bag(row_index, rows, mode="sum")  # [T, H]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: BackwardCFunction, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        (
            weights,
            matrices,
            gathered,
            gate_up,
            scale,
            hidden,
            typed_matrices,
            token,
            row_index,
            expert_ends,
        ) = saved
        width = typed_matrices.shape[2]
        rows = grad.index_select(0, token)  # [R, H]
        grad_hidden = F.grouped_mm(
            rows, typed_matrices[:, 2].mT, offs=expert_ends
        )  # [R, I], d / d(scaled hidden)
        gate, up = gate_up[:, :width], gate_up[:, width:]
        sigmoid = torch.sigmoid(gate)
        active = gate * sigmoid  # silu
        # The routing weight scales the hidden row, so its gradient is an inner product.
        grad_scale = (grad_hidden * active * up).sum(-1).float()  # [R]
        grad_hidden = grad_hidden * scale
        grad_gate_up = torch.empty_like(gate_up)
        torch.mul(grad_hidden, active, out=grad_gate_up[:, width:])
        sigmoid = sigmoid.addcmul(active, 1 - sigmoid)  # silu'
        torch.mul(grad_hidden * up, sigmoid, out=grad_gate_up[:, :width])
        grad_matrices = torch.empty_like(typed_matrices)
        grad_matrices[:, :2].copy_(
            F.grouped_mm(grad_gate_up.mT, gathered, offs=expert_ends).unflatten(1, (2, width))
        )
        grad_matrices[:, 2].copy_(F.grouped_mm(hidden.mT, rows, offs=expert_ends))
        grad_gathered = F.grouped_mm(
            grad_gate_up, typed_matrices[:, :2].flatten(1, 2), offs=expert_ends
        )  # [R, H]
        return (
            F.embedding_bag(row_index, grad_gathered, mode="sum"),
            grad_scale.index_select(0, row_index.flatten()).view_as(row_index).to(weights.dtype),
            grad_matrices.to(matrices.dtype),
            *[None] * 3,
        )
