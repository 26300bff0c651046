"""Sorts token-expert pairs by slot, in one launch with a program per slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.ops.reference import Dispatch
from coterie.ops.triton.launch import launch, next_power_of_two
from coterie.values import Routing

MAX_PAIRS_PER_STEP = 1024  # pairs that a program reads at once


def dispatch(routing: Routing, slot_of: Tensor, slots: int) -> Dispatch:
    """See ``reference.dispatch``. Does not synchronise with the host."""
    device, (tokens, k) = routing.topk_ids.device, routing.topk_ids.shape
    pairs = tokens * k
    result = Dispatch(
        slot_begin=torch.empty(slots + 1, dtype=torch.int32, device=device),
        token_ids=torch.empty(pairs, dtype=torch.int32, device=device),
        pair_ids=torch.empty(pairs, dtype=torch.int32, device=device),
        active_slots=torch.empty(slots, dtype=torch.int32, device=device),
    )
    launch(
        _dispatch_kernel,
        (slots + 1,),
        routing.topk_ids.contiguous(),
        routing.used,
        slot_of.contiguous(),
        result.slot_begin,
        result.token_ids,
        result.pair_ids,
        result.active_slots,
        pairs,
        len(slot_of),
        slots,
        K=k,
        PAIRS=min(MAX_PAIRS_PER_STEP, next_power_of_two(max(pairs, 1))),
        EXPERTS=next_power_of_two(len(slot_of)),
        SLOTS=next_power_of_two(max(slots, 1)),
        num_warps=4,
    )
    return result


@triton.jit(do_not_specialize=["pairs", "experts", "slots"])
def _dispatch_kernel(
    ids,  # [pairs] int64
    used,  # [experts] bool
    slot_of,  # [experts] int64
    slot_begin,  # [slots + 1] int32, as the next three
    token_ids,
    pair_ids,
    active_slots,
    pairs,
    experts,
    slots,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program ``slot`` lists the pairs of that slot; the last program those without a slot."""
    slot = tl.program_id(0)
    offset = tl.arange(0, PAIRS)
    count_before = tl.program_id(0) * 0
    for start in range(0, pairs, PAIRS):
        pair_slots = _load_slots(ids, slot_of, start + offset, pairs, slots)
        count_before += tl.sum((pair_slots < slot).to(tl.int32), axis=0)
    tl.store(slot_begin + slot, count_before)
    cursor = count_before
    for start in range(0, pairs, PAIRS):
        pair_slots = _load_slots(ids, slot_of, start + offset, pairs, slots)
        in_slot = pair_slots == slot
        target = cursor + tl.cumsum(in_slot.to(tl.int32), axis=0) - 1
        unserved = pair_slots == slots
        tl.store(pair_ids + target, tl.where(unserved, -1, start + offset), mask=in_slot)
        tl.store(token_ids + target, tl.where(unserved, -1, (start + offset) // K), mask=in_slot)
        cursor += tl.sum(in_slot.to(tl.int32), axis=0)
    expert = tl.arange(0, EXPERTS)
    valid = expert < experts
    expert_slots = tl.load(slot_of + expert, mask=valid, other=-1)
    has_pairs = tl.load(used + expert, mask=valid, other=0) != 0
    rank = tl.sum((has_pairs & (expert_slots >= 0) & (expert_slots < slot)).to(tl.int32), axis=0)
    if slot < slots:
        tl.store(active_slots + rank, slot, mask=cursor > count_before)
    else:
        index = tl.arange(0, SLOTS)
        tl.store(
            active_slots + index,
            tl.full((SLOTS,), -1, tl.int32),
            mask=(index >= rank) & (index < slots),
        )


@triton.jit
def _load_slots(ids, slot_of, pair, pairs, slots):
    """The slot of each pair: ``slots`` if it has none, ``slots + 1`` past the last pair."""
    expert = tl.load(ids + pair, mask=pair < pairs, other=-1)
    slot = tl.load(slot_of + expert, mask=expert >= 0, other=-1).to(tl.int32)
    return tl.where(pair < pairs, tl.where(slot < 0, slots, slot), slots + 1)
