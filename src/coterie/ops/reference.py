"""The truth that faster operations are compared with: short, plain, any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.quant import QTensor, dequantise
from coterie.values import Panels, Routing, Slab, Survey, membership


@dataclass(frozen=True)
class Dispatch:
    """Pairs of a token and one of its choices, sorted by the slot of the expert, then by token.

    ``begin[s] .. begin[s + 1]`` are the pairs of slot s. From ``begin[-1]`` on, where the expert is
    absent or the id -1, there is nothing to compute, and ``token`` and ``pair`` are -1.
    """

    begin: Tensor  # [slots + 1] int32
    token: Tensor  # [T * k] int32
    pair: Tensor  # [T * k] int32: token * k + choice, the place in the flat ids and weights
    active: Tensor  # [slots] int32: the slots that have pairs, ascending; then -1


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


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``ops.rms_norm``."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def gated(both: Tensor) -> Tensor:
    """See ``ops.gated``."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def survey(logits: Tensor, mask: int) -> Survey:
    """See ``ops.survey``."""
    best = logits.argmax(dim=-1)
    rest = logits.clone()
    rest[:, mask] = float("-inf")
    return Survey.of(logits, best, rest.argmax(dim=-1), logits.logsumexp(dim=-1))


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``ops.linear``: in the weight's own precision."""
    return F.linear(x.to(weight.dtype), weight).to(dtype)


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


def voices(asked: Tensor | None, narrowing: Tensor | None, *, opposite: bool = False) -> Tensor:
    """See ``ops.voices``."""
    known = asked if narrowing is None else narrowing
    assert known is not None  # or there is nothing to say of anybody
    everybody = torch.ones(known.shape, device=known.device)
    told, allowed = everybody, everybody
    if asked is not None:
        told = asked.to(everybody.dtype)
        allowed = _unless_silent(told, everybody)
    if narrowing is None:
        return allowed
    return _unless_silent(told * (~narrowing if opposite else narrowing), allowed)


def dispatch(routing: Routing, slot_of: Tensor, slots: int) -> Dispatch:
    """The pairs of ``routing`` by slot, where ``slot_of`` [E] of each expert is -1 if absent.

    Does not ask the host anything. ``routing.used`` must be the experts of ``routing.ids``.
    """
    slot = slot_of[routing.ids.clamp(min=0)].where(routing.ids >= 0, -1).flatten()  # [T * k]
    slot = slot.where(slot >= 0, slots)
    order = slot.argsort(stable=True)
    order = order.where(slot[order] < slots, -1)
    count = F.one_hot(slot, slots + 1).sum(0)[:slots]
    place = torch.arange(slots, device=slot.device)
    active = place.where(count > 0, slots).sort().values
    return Dispatch(
        begin=F.pad(count.cumsum(0), (1, 0)).to(torch.int32),
        token=order.div(routing.ids.shape[-1], rounding_mode="floor").to(torch.int32),
        pair=order.to(torch.int32),
        active=active.where(active < slots, -1).to(torch.int32),
    )


def _unless_silent(voice: Tensor, otherwise: Tensor) -> Tensor:
    return voice.where((voice > 0).any(dim=1, keepdim=True), otherwise)


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
