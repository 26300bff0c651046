"""The reference implementations: short, plain torch, correct on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.quantization import QTensor, dequantize
from coterie.values import Activation, LogitsSummary, PackedExperts, Routing, Slab, expert_mask


@dataclass(frozen=True)
class Dispatch:
    """Token-expert pairs sorted by the expert's slot, then by token.

    The pairs of slot s are ``slot_begin[s] .. slot_begin[s + 1]``. Pairs without an expert, or with
    an expert that is not in the slab, are last; their ``token_ids`` and ``pair_ids`` are -1.
    """

    slot_begin: Tensor  # [slots + 1] int32
    token_ids: Tensor  # [T * k] int32
    pair_ids: Tensor  # [T * k] int32: token * k + choice, the index into flat ids and weights
    active_slots: Tensor  # [slots] int32: slots with pairs, ascending; then -1


def top_ids(key: Tensor, k: int, tier: Tensor | None = None) -> Tensor:
    """Indices [..., k] of the largest of key [..., E], best first; ties go to the lower index.

    With ``tier`` [..., E] of small integers, a lower tier precedes a higher one, whatever the keys.
    All top-k selection uses this function: ``torch.topk`` does not define the order of ties.
    """
    if key.dtype == torch.float32:
        return torch.topk(_sort_codes(key, tier), min(k, key.shape[-1])).indices
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices
    if tier is not None:
        tier = tier.expand(key.shape).gather(-1, order).to(torch.uint8)
        order = order.gather(-1, torch.sort(tier, dim=-1, stable=True).indices)
    return order[..., :k].contiguous()


def top_mask(key: Tensor, k: int) -> Tensor:
    """Bool mask [..., E] of the k largest of key [..., E]; ties go to the lower index."""
    return expert_mask(top_ids(key, k), key.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``ops.rms_norm``."""
    x_fp32 = x.float()
    mean = x_fp32.square().mean(-1, keepdim=True)
    # An overflow of the mean to infinity would make all features 0; the difference makes them NaN.
    x_fp32 = x_fp32 * (torch.rsqrt(mean + epsilon) + (mean - mean))
    return weight * x_fp32.to(x.dtype)


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
}


def activate_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """See ``ops.activate_and_mul``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def summarize_logits(logits: Tensor, mask_id: int) -> LogitsSummary:
    """See ``ops.summarize_logits``."""
    best = logits.argmax(dim=-1)
    unmasked_logits = logits.clone()
    if mask_id >= 0:
        unmasked_logits[:, mask_id] = float("-inf")
    return LogitsSummary.from_logits(
        logits, best, unmasked_logits.argmax(dim=-1), logits.logsumexp(dim=-1)
    )


def linear(x: Tensor, weight: Tensor | QTensor, dtype: torch.dtype) -> Tensor:
    """See ``ops.linear``. A weight in 8 bits is dequantised, and computed in fp32."""
    weight = _dequantise(weight)
    return F.linear(x.to(weight.dtype), weight).to(dtype)


def round_activations(x: Tensor) -> Tensor:
    """x [..., k] in fp32, rounded to 8 bits in groups of 32 as the CPU kernels do it for ``linear``
    with a weight in 8 bits."""
    groups = F.pad(x.float(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 1e-30, 1 / scale, 0.0)
    return ((groups * inverse).round() * scale).flatten(-2)[..., : x.shape[-1]]


def run_experts(x: Tensor, routing: Routing, slab: Slab, activation: Activation = "silu") -> Tensor:
    """See ``ops.run_experts``. One expert at a time; synchronises with the host.

    Quantised experts are dequantised and computed in fp32.
    """
    if isinstance(slab.gate_up, QTensor):
        x = x.float()
    gate_up, down = slab.gate_up, slab.down
    # Only the CPU kernels read the packed layout.
    assert not isinstance(gate_up, PackedExperts)
    assert not isinstance(down, PackedExperts)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    ids = routing.topk_ids
    slots = slab.slot_of[ids.clamp(min=0)].masked_fill(ids < 0, -1)  # [T, k]
    for slot in slots[slots >= 0].unique().tolist():
        token, choice = torch.nonzero(slots == slot, as_tuple=True)
        hidden = F.linear(x[token], _dequantise(gate_up[slot]))
        y = F.linear(activate_and_mul(hidden, activation), _dequantise(down[slot]))
        out.index_add_(0, token, y.float() * routing.topk_weights[token, choice, None])
    return out


def vote_weights(
    voters: Tensor | None, voter_filter: Tensor | None, *, invert_filter: bool = False
) -> Tensor:
    """See ``ops.vote_weights``."""
    template = voters if voter_filter is None else voter_filter
    assert template is not None
    ones = torch.ones(template.shape, device=template.device)
    weights, fallback = ones, ones
    if voters is not None:
        weights = voters.to(ones.dtype)
        fallback = _fallback_where_no_voter(weights, ones)
    if voter_filter is None:
        return fallback
    return _fallback_where_no_voter(
        weights * (~voter_filter if invert_filter else voter_filter), fallback
    )


def dispatch(routing: Routing, slot_of: Tensor, slots: int) -> Dispatch:
    """Sorts the pairs of ``routing`` by slot; ``slot_of`` [E] is -1 for absent experts.

    Does not synchronise with the host. ``routing.used`` must be the set of ``routing.topk_ids``.
    """
    ids = routing.topk_ids
    slot = slot_of[ids.clamp(min=0)].where(ids >= 0, -1).flatten()  # [T * k]
    slot = slot.where(slot >= 0, slots)
    order = slot.argsort(stable=True)
    order = order.where(slot[order] < slots, -1)
    count = F.one_hot(slot, slots + 1).sum(0)[:slots]
    slot_ids = torch.arange(slots, device=slot.device)
    active = slot_ids.where(count > 0, slots).sort().values
    return Dispatch(
        slot_begin=F.pad(count.cumsum(0), (1, 0)).to(torch.int32),
        token_ids=order.div(ids.shape[-1], rounding_mode="floor").to(torch.int32),
        pair_ids=order.to(torch.int32),
        active_slots=active.where(active < slots, -1).to(torch.int32),
    )


def _fallback_where_no_voter(weights: Tensor, fallback: Tensor) -> Tensor:
    return weights.where((weights > 0).any(dim=1, keepdim=True), fallback)


def _dequantise(weight: Tensor | QTensor) -> Tensor:
    return dequantize(weight) if isinstance(weight, QTensor) else weight


def _sort_codes(key: Tensor, tier: Tensor | None) -> Tensor:
    """int64 [..., E] without ties, sorted as (lower tier, larger key, lower index): E < 2**16."""
    # IEEE floats sort as integers once the bits of negative ones are flipped. Adding 0 turns -0
    # into 0.
    bits = (key + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    size = key.shape[-1]
    tie_break = torch.arange(size - 1, -1, -1, device=key.device)
    code = (bits.to(torch.int64) << 16) + tie_break
    return code if tier is None else code - (tier.to(torch.int64) << 49)
