"""Which tokens each expert computes: each expert has a program that lists its own; one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.ops.reference import Dispatch
from coterie.ops.triton.launch import launch, power_of_two
from coterie.values import Routing

CHUNK = 1024  # pairs that a program looks at together


def dispatch(routing: Routing, slot_of: Tensor, slots: int) -> Dispatch:
    """See ``reference.dispatch``; nothing is asked of the host, and shapes follow from shapes."""
    device, (tokens, k) = routing.ids.device, routing.ids.shape
    pairs = tokens * k
    found = Dispatch(
        begin=torch.empty(slots + 1, dtype=torch.int32, device=device),
        token=torch.empty(pairs, dtype=torch.int32, device=device),
        pair=torch.empty(pairs, dtype=torch.int32, device=device),
        active=torch.empty(slots, dtype=torch.int32, device=device),
    )
    launch(
        _list,
        (slots + 1,),
        routing.ids.contiguous(),
        routing.used,
        slot_of.contiguous(),
        found.begin,
        found.token,
        found.pair,
        found.active,
        pairs,
        len(slot_of),
        slots,
        K=k,
        PAIRS=min(CHUNK, power_of_two(max(pairs, 1))),
        EXPERTS=power_of_two(len(slot_of)),
        SLOTS=power_of_two(max(slots, 1)),
        num_warps=4,
    )
    return found


@triton.jit(do_not_specialize=["pairs", "experts", "slots"])
def _list(
    ids,  # [pairs] int64
    used,  # [experts] bool
    slot_of,  # [experts] int64
    begin,  # [slots + 1] int32, and so are the others
    token,
    pair,
    active,
    pairs,
    experts,
    slots,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Program ``slot`` lists the pairs of one slot; the last one those that no slot computes."""
    slot = tl.program_id(0)
    at = tl.arange(0, PAIRS)
    before = tl.program_id(0) * 0
    for start in range(0, pairs, PAIRS):
        found = _slots(ids, slot_of, start + at, pairs, slots)
        before += tl.sum((found < slot).to(tl.int32), axis=0)
    tl.store(begin + slot, before)
    place = before
    for start in range(0, pairs, PAIRS):
        found = _slots(ids, slot_of, start + at, pairs, slots)
        mine = found == slot
        to = place + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        nobody = found == slots
        tl.store(pair + to, tl.where(nobody, -1, start + at), mask=mine)
        tl.store(token + to, tl.where(nobody, -1, (start + at) // K), mask=mine)
        place += tl.sum(mine.to(tl.int32), axis=0)
    expert = tl.arange(0, EXPERTS)
    known = expert < experts
    theirs = tl.load(slot_of + expert, mask=known, other=-1)
    busy = tl.load(used + expert, mask=known, other=0) != 0
    rank = tl.sum((busy & (theirs >= 0) & (theirs < slot)).to(tl.int32), axis=0)
    if slot < slots:
        tl.store(active + rank, slot, mask=place > before)
    else:
        rest = tl.arange(0, SLOTS)
        tl.store(
            active + rest, tl.full((SLOTS,), -1, tl.int32), mask=(rest >= rank) & (rest < slots)
        )


@triton.jit
def _slots(ids, slot_of, at, pairs, slots):
    """The slot of each pair: ``slots`` where nobody computes it, one more past the last pair."""
    expert = tl.load(ids + at, mask=at < pairs, other=-1)
    slot = tl.load(slot_of + expert, mask=expert >= 0, other=-1).to(tl.int32)
    return tl.where(at < pairs, tl.where(slot < 0, slots, slot), slots + 1)
