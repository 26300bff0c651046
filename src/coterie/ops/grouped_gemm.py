"""Experts in one grouped product: token-expert pairs sorted by expert, no expert read in vain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.values import Routing, Slab

ROW_ALIGNMENT = 16  # bytes that every row must be a multiple of


def supports(x: Tensor, slab: Slab) -> bool:
    """Whether the grouped product takes these shapes and types."""
    if not isinstance(slab.gate_up, Tensor) or not isinstance(slab.down, Tensor):
        return False
    widths = (slab.gate_up.shape[-1], slab.down.shape[-1])
    aligned = all(width * x.element_size() % ROW_ALIGNMENT == 0 for width in widths)
    return aligned and len(slab.gate_up) > 0 and x.dtype in (torch.float32, torch.bfloat16)


def run_experts(x: Tensor, routing: Routing, slab: Slab) -> Tensor:
    """See ``ops.run_experts``. Does not ask the host anything."""
    gate_up, down = slab.gate_up, slab.down
    assert isinstance(gate_up, Tensor)  # as ``fits`` found them
    assert isinstance(down, Tensor)
    experts = len(gate_up)
    slots = (
        slab.slot_of[routing.topk_ids.clamp(min=0)].where(routing.topk_ids >= 0, -1).flatten()
    )  # [T k]
    slots = slots.where(slots >= 0, experts)  # nobody sorts last, past the end of every group
    order = slots.argsort(stable=True)
    token = order // routing.topk_ids.shape[-1]
    ends = F.one_hot(slots, experts + 1).sum(0)[:experts].cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[token], gate_up.mT, offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    # Rows past the last group were never written.
    valid = (torch.arange(len(token), device=x.device) < ends[-1]).unsqueeze(-1)
    y = y.float().where(valid, 0.0) * routing.topk_weights.flatten()[order].unsqueeze(-1)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return out.index_add_(0, token, y)
