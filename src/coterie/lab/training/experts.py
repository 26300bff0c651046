"""Routed experts: sort by expert, gather, grouped matmuls, gather back.

Shapes: T tokens, k experts each, R rows sorted by expert, E experts, I width, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    order, matrices = sort_by_expert(ids, len(matrices)), matrices.to(x.dtype)
    token = (order.pair_index // ids.shape[1]).clamp_max(len(x) - 1)  # [R]
    gate_up = matrices[:, :2].flatten(1, 2).mT
    gate, up = F.grouped_mm(x[token], gate_up, offs=order.expert_ends).chunk(2, -1)  # [R, I]
    # A padding row has weight 0, which also keeps it out of every gradient.
    scale = F.pad(weights.flatten(), (0, 1))[order.pair_index].to(x.dtype)[:, None]
    rows = F.grouped_mm(F.silu(gate) * up * scale, matrices[:, 2], offs=order.expert_ends)
    return rows[order.row_index].sum(1), order.counts
