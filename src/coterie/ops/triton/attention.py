"""Split-KV attention of a block over cached keys, in three launches.

1: RMS norm, RoPE and the write into the cache. 2: partial attention over splits of the keys, as a
block has few queries and may see many keys. 3: the merge of the splits, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from coterie.ops.triton.launch import ceil_div, launch, next_power_of_two
from coterie.values import LayerKV, QueryPositions

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETER_MODE = bool(knobs.runtime.interpret)
TILE_SIZES = {2: (64, 64), 4: (16, 16)}
"""Largest tile (queries, keys) of a program, by bytes of an element.

Query heads that share a KV head count as further queries. fp32 is multiplied in registers, which
limits the tile."""
TARGET_PROGRAMS = 264  # two for each multiprocessor of a large GPU
MAX_SPLITS = 64  # of the keys
MAX_HEAD_DIM = 256


def supports_attention(qkv: Tensor, kv: LayerKV) -> bool:
    """Whether the kernels support these dtypes and sizes."""
    same_dtype = qkv.dtype == kv.keys.dtype == kv.values.dtype
    return same_dtype and qkv.dtype in FLOAT_DTYPES and qkv.shape[-1] <= MAX_HEAD_DIM


def fused_attention(
    qkv: Tensor, norms: tuple[Tensor, Tensor], queries: QueryPositions, kv: LayerKV, epsilon: float
) -> Tensor:
    """See ``ops.fused_attention``. Sums in fp32; does not synchronise with the host."""
    rows, width, all_heads, dim = qkv.shape
    kv_heads = kv.keys.shape[1]
    heads = all_heads - 2 * kv_heads
    if kv.keys.stride() != kv.values.stride() or kv.keys.stride(3) != 1:
        raise ValueError("keys and values do not have the strides of a KV cache")
    sizes = {"HEADS": heads, "KV": kv_heads, "DIM": dim, "PADDED": _padded_dim(dim)}
    strides = kv.keys.stride()[:3]
    query = torch.empty(rows, width, heads, dim, dtype=qkv.dtype, device=qkv.device)
    launch(
        _norm_rope_store_kernel,
        (rows * width, all_heads),
        qkv.contiguous(),
        *norms,
        queries.positions.contiguous(),
        kv.cache_rows,
        queries.cos.contiguous(),
        queries.sin.contiguous(),
        query,
        kv.keys,
        kv.values,
        width,
        *strides,
        HALF=queries.cos.shape[-1],
        EPSILON=epsilon,
        num_warps=1,
        **sizes,
    )
    query_count = width * heads // kv_heads  # queries that share a KV head
    max_tile, keys = TILE_SIZES[qkv.element_size()]
    tile = min(max_tile, max(16, next_power_of_two(query_count)))
    tiles = ceil_div(query_count, tile)
    blocks = max(1, ceil_div(queries.kv_length, keys))
    splits = max(1, min(blocks, MAX_SPLITS, TARGET_PROGRAMS // (tiles * rows * kv_heads)))
    split_keys = ceil_div(blocks, splits) * keys
    splits = ceil_div(blocks * keys, split_keys)
    shape = (splits, rows, width, heads)
    sums = torch.empty(*shape, dim, dtype=torch.float32, device=qkv.device)
    peaks = torch.empty(*shape, dtype=torch.float32, device=qkv.device)
    totals = torch.empty(*shape, dtype=torch.float32, device=qkv.device)
    launch(
        _attention_kernel,
        (tiles, rows * kv_heads, splits),
        query,
        kv.keys,
        kv.values,
        queries.key_limits.contiguous(),
        kv.cache_rows,
        sums,
        peaks,
        totals,
        width,
        queries.kv_length,
        split_keys,
        *strides,
        SCALE=dim**-0.5,
        QUERIES=tile,
        KEYS=keys,
        UPCAST=INTERPRETER_MODE,
        num_warps=4,
        num_stages=2,
        **sizes,
    )
    out = torch.empty_like(query)
    launch(
        _merge_splits_kernel,
        (rows * width * heads,),
        sums,
        peaks,
        totals,
        out,
        rows * width * heads,
        splits,
        DIM=dim,
        PADDED=sizes["PADDED"],
        num_warps=1,
    )
    return out


def _padded_dim(dim: int) -> int:
    return max(16, next_power_of_two(dim))


@triton.jit
def _norm_rope_store_kernel(
    qkv,  # [B * W, HEADS + 2 KV, DIM]
    query_norm,  # [DIM]
    key_norm,
    positions,  # [B * W] int64
    cache_rows,  # [B] int64
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
    """One head of one token: normed and rotated into ``query`` or ``keys``, or copied to values."""
    token, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, PADDED)
    inside = d < DIM
    head_pointer = qkv + (token * (HEADS + 2 * KV) + head) * DIM
    x = tl.load(head_pointer + d, mask=inside, other=0.0)
    row = tl.load(cache_rows + token // width)
    cache_offset = row * row_stride + tl.load(positions + token) * position_stride
    if head < HEADS + KV:
        # RoPE pairs a feature with that of the other half; features past both are unchanged.
        partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
        other = tl.load(head_pointer + partner, mask=inside, other=0.0)
        x_fp32 = x.to(tl.float32)
        square = tl.sum(x_fp32 * x_fp32, axis=0)
        inverse_rms = tl.rsqrt(square / DIM + EPSILON) + (square - square)  # NaN if it overflows
        is_query = head < HEADS
        weight = tl.where(
            is_query,
            tl.load(query_norm + d, mask=inside, other=0.0).to(tl.float32),
            tl.load(key_norm + d, mask=inside, other=0.0).to(tl.float32),
        )
        partner_weight = tl.where(
            is_query,
            tl.load(query_norm + partner, mask=inside, other=0.0).to(tl.float32),
            tl.load(key_norm + partner, mask=inside, other=0.0).to(tl.float32),
        )
        rotates = d < 2 * HALF
        angle = token * HALF + tl.where(d < HALF, d, tl.where(rotates, d - HALF, 0))
        c = tl.load(cos + angle, mask=rotates, other=1.0)
        s = tl.load(sin + angle, mask=rotates, other=0.0)
        s = tl.where(d < HALF, -s, s)
        rotated = (
            x_fp32 * inverse_rms * weight * c
            + other.to(tl.float32) * inverse_rms * partner_weight * s
        )
        if is_query:
            target = query + (token * HEADS + head) * DIM
            tl.store(target + d, rotated.to(query.dtype.element_ty), mask=inside)
        else:
            target = keys + cache_offset + (head - HEADS) * head_stride
            tl.store(target + d, rotated.to(keys.dtype.element_ty), mask=inside)
    else:
        tl.store(values + cache_offset + (head - HEADS - KV) * head_stride + d, x, mask=inside)


@triton.jit
def _attention_kernel(
    query,  # [B, W, HEADS, DIM]
    keys,
    values,
    limits,  # [B, W] int64
    cache_rows,
    sums,  # [splits, B, W, HEADS, DIM] fp32
    peaks,  # [splits, B, W, HEADS] fp32
    totals,
    width,
    kv_length,
    split_keys,
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
    UPCAST: tl.constexpr,
):
    """Attention of a tile of queries of one row and KV head, over one split of the keys."""
    SHARED: tl.constexpr = HEADS // KV
    row = tl.program_id(1) // KV
    kv_head = tl.program_id(1) % KV
    query_index = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    valid_query = query_index < width * SHARED
    token = row * width + query_index // SHARED
    head_index = token * HEADS + kv_head * SHARED + query_index % SHARED  # in [B, W, HEADS]
    d = tl.arange(0, PADDED)
    inside = d < DIM
    offset = head_index[:, None] * DIM + d[None, :]
    q = tl.load(query + offset, mask=valid_query[:, None] & inside[None, :], other=0.0)
    limit = tl.load(limits + token, mask=valid_query, other=0).to(tl.int32)
    cache_offset = tl.load(cache_rows + row) * row_stride + kv_head * head_stride
    peak = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    accumulator = tl.zeros((QUERIES, PADDED), tl.float32)
    first = tl.program_id(2) * split_keys
    for start in range(first, tl.minimum(first + split_keys, kv_length), KEYS):
        position = start + tl.arange(0, KEYS)
        cache_index = cache_offset + position[:, None] * position_stride + d[None, :]
        valid = (position < kv_length)[:, None] & inside[None, :]
        k = tl.load(keys + cache_index, mask=valid, other=0.0)
        v = tl.load(values + cache_index, mask=valid, other=0.0)
        if UPCAST:
            score = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = position[None, :] < limit[:, None]
        score = tl.where(visible, score * SCALE, -1e30)
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        p = tl.where(visible, tl.exp(score - new_peak[:, None]), 0.0)
        rescale = tl.exp(peak - new_peak)
        total = total * rescale + tl.sum(p, axis=1)
        p = p.to(v.dtype)
        if UPCAST:
            pv = tl.dot(p.to(tl.float32), v.to(tl.float32), input_precision="ieee")
        else:
            pv = tl.dot(p, v, input_precision="ieee")
        accumulator = accumulator * rescale[:, None] + pv
        peak = new_peak
    split_offset = tl.program_id(2) * (tl.num_programs(1) // KV) * width * HEADS
    tl.store(
        sums + split_offset * DIM + offset, accumulator, mask=valid_query[:, None] & inside[None, :]
    )
    tl.store(peaks + split_offset + head_index, peak, mask=valid_query)
    tl.store(totals + split_offset + head_index, total, mask=valid_query)


@triton.jit(do_not_specialize=["splits"])
def _merge_splits_kernel(
    sums,
    peaks,
    totals,
    out,  # [B, W, HEADS, DIM]
    count,
    splits,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Combines the splits of one query."""
    head_index = tl.program_id(0)
    d = tl.arange(0, PADDED)
    inside = d < DIM
    peak = tl.load(peaks + head_index)
    for split in range(1, splits):
        peak = tl.maximum(peak, tl.load(peaks + split * count + head_index))
    total = peak * 0.0
    accumulator = tl.zeros((PADDED,), tl.float32)
    for split in range(splits):
        index = split * count + head_index
        weight = tl.exp(tl.load(peaks + index) - peak)
        total += weight * tl.load(totals + index)
        accumulator += weight * tl.load(sums + index * DIM + d, mask=inside, other=0.0)
    tl.store(
        out + head_index * DIM + d, (accumulator / total).to(out.dtype.element_ty), mask=inside
    )
