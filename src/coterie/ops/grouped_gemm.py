"""Experts by torch's grouped matrix product: unused experts are not read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.ops.reference import activate_and_mul
from coterie.values import Activation, Routing, Slab

ROW_ALIGNMENT = 16  # bytes; every row must be a multiple


def supports(x: Tensor, slab: Slab) -> bool:
    """Whether the grouped product supports these shapes and dtypes."""
    if not isinstance(slab.gate_up, Tensor) or not isinstance(slab.down, Tensor):
        return False
    widths = (slab.gate_up.shape[-1], slab.down.shape[-1])
    aligned = all(width * x.element_size() % ROW_ALIGNMENT == 0 for width in widths)
    return aligned and len(slab.gate_up) > 0 and x.dtype in (torch.float32, torch.bfloat16)


def run_experts(x: Tensor, routing: Routing, slab: Slab, activation: Activation = "silu") -> Tensor:
    """See ``ops.run_experts``. Does not synchronise with the host."""
    gate_up, down = slab.gate_up, slab.down
    assert isinstance(gate_up, Tensor)  # checked by ``supports``
    assert isinstance(down, Tensor)
    experts = len(gate_up)
    ids = routing.topk_ids
    slots = slab.slot_of[ids.clamp(min=0)].where(ids >= 0, -1).flatten()  # [T k]
    slots = slots.where(slots >= 0, experts)  # absent experts sort last, past every group
    order = slots.argsort(stable=True)
    token = order // ids.shape[-1]
    ends = F.one_hot(slots, experts + 1).sum(0)[:experts].cumsum(0).to(torch.int32)
    hidden = activate_and_mul(F.grouped_mm(x[token], gate_up.mT, offs=ends), activation)
    y = F.grouped_mm(hidden, down.mT, offs=ends)
    # Rows past the last group are uninitialised.
    valid = (torch.arange(len(token), device=x.device) < ends[-1]).unsqueeze(-1)
    y = y.float().where(valid, 0.0) * routing.topk_weights.flatten()[order].unsqueeze(-1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return out.index_add_(0, token, y)
