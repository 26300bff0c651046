"""Attention for a block over keys by position: placed, mixed in parts, summed; three launches.

A block has few queries and may see many keys: programs share the keys out among themselves, and a
last one adds up what they found, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from coterie.ops.triton.launch import launch, pieces, power_of_two
from coterie.values import KeyValues, Sight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = bool(knobs.runtime.interpret)
TILE = {2: (64, 64), 4: (16, 16)}
"""By bytes of a number: queries and keys that a program looks at together, at most. Heads that
share keys queue as further queries; fp32 is multiplied in registers, of which there are few."""
PROGRAMS = 264  # that shall share the work: two for each processor of a large GPU
PARTS = 64  # into which the keys are cut at most
WIDEST = 256  # numbers of a head


def attends(qkv: Tensor, held: KeyValues) -> bool:
    """Whether the kernels take these types and sizes."""
    same = qkv.dtype == held.keys.dtype == held.values.dtype
    return same and qkv.dtype in FLOATS and qkv.shape[-1] <= WIDEST


def attend(
    qkv: Tensor, norms: tuple[Tensor, Tensor], sight: Sight, held: KeyValues, epsilon: float
) -> Tensor:
    """See ``ops.attend``. Sums in fp32; asks the host nothing."""
    rows, width, every, dim = qkv.shape
    kv_heads = held.keys.shape[1]
    heads = every - 2 * kv_heads
    if held.keys.stride() != held.values.stride() or held.keys.stride(3) != 1:
        raise ValueError("keys and values lie in memory otherwise than a cache's do")
    sizes = {"HEADS": heads, "KV": kv_heads, "DIM": dim, "PADDED": _padded(dim)}
    strides = held.keys.stride()[:3]
    query = torch.empty(rows, width, heads, dim, dtype=qkv.dtype, device=qkv.device)
    launch(
        _place,
        (rows * width, every),
        qkv.contiguous(),
        *norms,
        sight.positions.contiguous(),
        held.places,
        sight.cos.contiguous(),
        sight.sin.contiguous(),
        query,
        held.keys,
        held.values,
        width,
        *strides,
        HALF=sight.cos.shape[-1],
        EPSILON=epsilon,
        num_warps=1,
        **sizes,
    )
    count = width * heads // kv_heads  # queries that share a head's keys
    most, keys = TILE[qkv.element_size()]
    tile = min(most, max(16, power_of_two(count)))
    tiles = pieces(count, tile)
    blocks = max(1, pieces(sight.reach, keys))
    parts = max(1, min(blocks, PARTS, PROGRAMS // (tiles * rows * kv_heads)))
    each = pieces(blocks, parts) * keys
    parts = pieces(blocks * keys, each)
    shape = (parts, rows, width, heads)
    sums = torch.empty(*shape, dim, dtype=torch.float32, device=qkv.device)
    peaks = torch.empty(*shape, dtype=torch.float32, device=qkv.device)
    totals = torch.empty(*shape, dtype=torch.float32, device=qkv.device)
    launch(
        _mix,
        (tiles, rows * kv_heads, parts),
        query,
        held.keys,
        held.values,
        sight.limits.contiguous(),
        held.places,
        sums,
        peaks,
        totals,
        width,
        sight.reach,
        each,
        *strides,
        SCALE=dim**-0.5,
        QUERIES=tile,
        KEYS=keys,
        WIDE=INTERPRETED,
        num_warps=4,
        num_stages=2,
        **sizes,
    )
    out = torch.empty_like(query)
    launch(
        _add_up,
        (rows * width * heads,),
        sums,
        peaks,
        totals,
        out,
        rows * width * heads,
        parts,
        DIM=dim,
        PADDED=sizes["PADDED"],
        num_warps=1,
    )
    return out


def _padded(dim: int) -> int:
    return max(16, power_of_two(dim))


@triton.jit
def _place(
    qkv,  # [B * W, HEADS + 2 KV, DIM]
    query_norm,  # [DIM]
    key_norm,
    positions,  # [B * W] int64
    places,  # [B] int64
    cos,  # [B * W, HALF] fp32
    sin,
    query,  # [B * W, HEADS, DIM]
    keys,  # [rows, KV, length, DIM]
    values,
    width,
    row_stride,
    head_stride,
    position_stride,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HALF: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """One head of one token: normed and turned into ``query`` or ``keys``, or into ``values``."""
    token, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, PADDED)
    inside = d < DIM
    mine = qkv + (token * (HEADS + 2 * KV) + head) * DIM
    x = tl.load(mine + d, mask=inside, other=0.0)
    row = tl.load(places + token // width)
    spot = row * row_stride + tl.load(positions + token) * position_stride
    if head < HEADS + KV:
        # Halves pair up, not neighbours; features past both stay as they are.
        partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
        other = tl.load(mine + partner, mask=inside, other=0.0)
        wide = x.to(tl.float32)
        size = tl.rsqrt(tl.sum(wide * wide, axis=0) / DIM + EPSILON)
        whose = head < HEADS
        weight = tl.where(
            whose,
            tl.load(query_norm + d, mask=inside, other=0.0).to(tl.float32),
            tl.load(key_norm + d, mask=inside, other=0.0).to(tl.float32),
        )
        theirs = tl.where(
            whose,
            tl.load(query_norm + partner, mask=inside, other=0.0).to(tl.float32),
            tl.load(key_norm + partner, mask=inside, other=0.0).to(tl.float32),
        )
        turns = d < 2 * HALF
        angle = token * HALF + tl.where(d < HALF, d, tl.where(turns, d - HALF, 0))
        c = tl.load(cos + angle, mask=turns, other=1.0)
        s = tl.load(sin + angle, mask=turns, other=0.0)
        s = tl.where(d < HALF, -s, s)
        turned = wide * size * weight * c + other.to(tl.float32) * size * theirs * s
        if whose:
            to = query + (token * HEADS + head) * DIM
            tl.store(to + d, turned.to(query.dtype.element_ty), mask=inside)
        else:
            to = keys + spot + (head - HEADS) * head_stride
            tl.store(to + d, turned.to(keys.dtype.element_ty), mask=inside)
    else:
        tl.store(values + spot + (head - HEADS - KV) * head_stride + d, x, mask=inside)


@triton.jit
def _mix(
    query,  # [B, W, HEADS, DIM]
    keys,
    values,
    limits,  # [B, W] int64
    places,
    sums,  # [parts, B, W, HEADS, DIM] fp32
    peaks,  # [parts, B, W, HEADS] fp32
    totals,
    width,
    reach,
    each,
    row_stride,
    head_stride,
    position_stride,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    SCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Queries of one row and head of keys, over the ``each`` keys of one part."""
    SHARED: tl.constexpr = HEADS // KV
    row = tl.program_id(1) // KV
    kv_head = tl.program_id(1) % KV
    number = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = number < width * SHARED
    whose = row * width + number // SHARED
    spot = whose * HEADS + kv_head * SHARED + number % SHARED  # in [B, W, HEADS]
    d = tl.arange(0, PADDED)
    inside = d < DIM
    at = spot[:, None] * DIM + d[None, :]
    q = tl.load(query + at, mask=real[:, None] & inside[None, :], other=0.0)
    limit = tl.load(limits + whose, mask=real, other=0).to(tl.int32)
    held = tl.load(places + row) * row_stride + kv_head * head_stride
    peak = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, PADDED), tl.float32)
    first = tl.program_id(2) * each
    for start in range(first, tl.minimum(first + each, reach), KEYS):
        place = start + tl.arange(0, KEYS)
        where = held + place[:, None] * position_stride + d[None, :]
        there = (place < reach)[:, None] & inside[None, :]
        k = tl.load(keys + where, mask=there, other=0.0)
        v = tl.load(values + where, mask=there, other=0.0)
        if WIDE:
            score = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = place[None, :] < limit[:, None]
        score = tl.where(seen, score * SCALE, -1e30)
        higher = tl.maximum(peak, tl.max(score, axis=1))
        share = tl.where(seen, tl.exp(score - higher[:, None]), 0.0)
        fade = tl.exp(peak - higher)
        total = total * fade + tl.sum(share, axis=1)
        share = share.to(v.dtype)
        if WIDE:
            more = tl.dot(share.to(tl.float32), v.to(tl.float32), input_precision="ieee")
        else:
            more = tl.dot(share, v, input_precision="ieee")
        mixed = mixed * fade[:, None] + more
        peak = higher
    part = tl.program_id(2) * (tl.num_programs(1) // KV) * width * HEADS
    tl.store(sums + part * DIM + at, mixed, mask=real[:, None] & inside[None, :])
    tl.store(peaks + part + spot, peak, mask=real)
    tl.store(totals + part + spot, total, mask=real)


@triton.jit(do_not_specialize=["parts"])
def _add_up(
    sums,
    peaks,
    totals,
    out,  # [B, W, HEADS, DIM]
    count,
    parts,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """What all parts found for one query."""
    spot = tl.program_id(0)
    d = tl.arange(0, PADDED)
    inside = d < DIM
    peak = tl.load(peaks + spot)
    for part in range(1, parts):
        peak = tl.maximum(peak, tl.load(peaks + part * count + spot))
    total = peak * 0.0
    mixed = tl.zeros((PADDED,), tl.float32)
    for part in range(parts):
        at = part * count + spot
        weight = tl.exp(tl.load(peaks + at) - peak)
        total += weight * tl.load(totals + at)
        mixed += weight * tl.load(sums + at * DIM + d, mask=inside, other=0.0)
    tl.store(out + spot * DIM + d, (mixed / total).to(out.dtype.element_ty), mask=inside)
