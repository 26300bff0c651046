"""The truth that faster operations are compared with: short, plain, any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.quant import QTensor, dequantise
from coterie.values import Panels, Routing, Slab, membership


def top_ids(key: Tensor, k: int, tier: Tensor | None = None) -> Tensor:
    """Indices [..., k] of the largest of key [..., E], best first; ties go to the lower index.

    With ``tier`` [..., E] of small whole numbers, a lower tier comes first whatever its key. This
    is the only top-k: ``torch.topk`` leaves ties open, and backends would disagree.
    """
    if key.dtype == torch.float32:
        return torch.topk(_distinct(key, tier), min(k, key.shape[-1])).indices
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices
    if tier is not None:
        tier = tier.expand(key.shape).gather(-1, order).to(torch.uint8)
        order = order.gather(-1, torch.sort(tier, dim=-1, stable=True).indices)
    return order[..., :k].contiguous()


def top_mask(key: Tensor, k: int) -> Tensor:
    """Bool mask [..., E] of the k largest of key [..., E]; ties go to the lower index."""
    return membership(top_ids(key, k), key.shape[-1])


def run_experts(x: Tensor, routing: Routing, slab: Slab) -> Tensor:
    """See ``ops.run_experts``. One expert at a time; asks the host which are there.

    Quantised experts are computed with in fp32.
    """
    if isinstance(slab.gate_up, QTensor):
        x = x.float()
    gate_up, down = slab.gate_up, slab.down
    # Panels cannot be read a matrix at a time: only the kernels that packed them take them.
    assert not isinstance(gate_up, Panels)
    assert not isinstance(down, Panels)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    slots = slab.slot_of[routing.ids.clamp(min=0)].masked_fill(routing.ids < 0, -1)  # [T, k]
    for slot in slots[slots >= 0].unique().tolist():
        token, choice = torch.nonzero(slots == slot, as_tuple=True)
        y = _swiglu(x[token], _plain(gate_up[slot]), _plain(down[slot]))
        out.index_add_(0, token, y.float() * routing.weights[token, choice, None])
    return out


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def _plain(weight: Tensor | QTensor) -> Tensor:
    return dequantise(weight) if isinstance(weight, QTensor) else weight


def _distinct(key: Tensor, tier: Tensor | None) -> Tensor:
    """int64 [..., E] without ties, sorted as (lower tier, larger key, lower index): E < 2**16."""
    # The bits of an IEEE float sort as integers do once those of the negative ones are flipped;
    # adding 0 turns -0 into 0.
    bits = (key + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    size = key.shape[-1]
    place = torch.arange(size - 1, -1, -1, device=key.device)
    code = (bits.to(torch.int64) << 16) + place
    return code if tier is None else code - (tier.to(torch.int64) << 49)
