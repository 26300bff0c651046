"""The expert kernels: one for both products, gate-up and down, and one for the weighted sum.

A program computes a few weight rows of one expert for all of its tokens, one tile of tokens at a
time. Few tokens are one tile, so the weights are streamed once along k. With TRANSPOSED, weight
rows are the M dimension of the tensor core product, which is at least 64 on Hopper, and tokens the
N dimension, which may be small. UPCAST computes in fp32, for Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_kernel(
    x,  # [rows, K]
    weight,  # [slots, N, ROW_SIZE] stored elements, slots STRIDE apart; gate-up has 2 * N rows
    scales,  # [slots, N, SCALES_SIZE] bf16, SCALES_STRIDE apart; not read if BITS is 16
    row_ids,  # [pairs] int32: token ids of gate-up, pair ids of down; see ``reference.Dispatch``
    slot_begin,  # [slots + 1] int32
    active_slots,  # [slots] int32
    out,  # output [pairs, N]
    K: tl.constexpr,
    N: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALES_SIZE: tl.constexpr,
    SCALES_STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "" for down
):
    """COLUMNS of a product, for the pairs of one expert.

    Gate-up reads the tokens of its pairs, and gives activation(gate) * up in the order of the
    pairs. Down reads these in that order, and writes each to the row of its pair id; rows of pairs
    without a slot are not written.
    """
    GATED: tl.constexpr = ACTIVATION != ""
    ROWS: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
    tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    active_index = tl.program_id(0) // tiles
    first_column = (tl.program_id(0) % tiles) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    slot = tl.load(active_slots + active_index)
    if slot >= 0:
        start = tl.load(slot_begin + slot)
        stop = tl.load(slot_begin + slot + 1)
        # Rows past the end repeat the last row; their results are not stored.
        if GATED:
            # Gate and up rows alternate, so that two adjacent results belong to one column.
            index = tl.arange(0, ROWS)
            row = (index % 2) * N + tl.minimum(first_column + index // 2, N - 1)
        else:
            row = tl.minimum(column, N - 1)
        weight_offset = slot.to(tl.int64) * STRIDE
        scales_offset = slot.to(tl.int64) * SCALES_STRIDE
        for first in range(start, stop, TOKENS):
            pair_index = first + tl.arange(0, TOKENS)
            valid = pair_index < stop
            row_id = tl.load(row_ids + pair_index, mask=valid, other=0)
            total = _tiled_matmul(
                x,
                (row_id if GATED else pair_index) * K,
                valid,
                weight,
                weight_offset + row * ROW_SIZE,
                scales,
                scales_offset + row * SCALES_SIZE,
                K,
                TOKENS,
                ROWS,
                STEP,
                BITS,
                GROUP,
                TRANSPOSED,
                UPCAST,
            )
            if GATED:
                gate, up = tl.split(tl.reshape(total, (TOKENS, COLUMNS, 2)))
                inner = gate
                if ACTIVATION == "gelu-tanh":  # 0.5 (1 + tanh z) is the sigmoid of 2 z
                    inner = 1.5957691216 * (gate + 0.044715 * gate * gate * gate)
                total = gate / (1.0 + tl.exp(-inner)) * up
            tl.store(
                out + (pair_index if GATED else row_id)[:, None] * N + column[None, :],
                total.to(out.dtype.element_ty),
                mask=valid[:, None] & (column < N)[None, :],
            )


@triton.jit
def sum_kernel(
    y,  # [tokens * CHOICES, HIDDEN] fp32
    ids,  # [tokens, CHOICES] int64
    slot_of,  # [experts] int64
    weights,  # [tokens, CHOICES] fp32
    out,  # [tokens, HIDDEN] fp32
    HIDDEN: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """COLUMNS of a token's weighted sum, in the order of its choices."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(CHOICES):  # pyright: ignore[reportGeneralTypeIssues]
        pair = token * CHOICES + choice
        expert = tl.load(ids + pair)
        slot = tl.where(expert >= 0, tl.load(slot_of + tl.maximum(expert, 0)), -1)
        weight = tl.load(weights + pair)
        # Rows of absent experts are uninitialised and count as zero.
        expert_out = tl.load(y + pair * HIDDEN + column, mask=column < HIDDEN, other=0.0)
        total += weight * tl.where(slot >= 0, expert_out, 0.0)
    tl.store(out + token * HIDDEN + column, total, mask=column < HIDDEN)


@triton.jit
def _tiled_matmul(
    x,
    x_offset,
    valid,
    weight,
    weight_offset,
    scales,
    scales_offset,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """fp32 [TOKENS, ROWS]: the ``valid`` rows of x times weight rows, at these offsets."""
    x_dtype = x.dtype.element_ty
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    out_rows: tl.constexpr = ROWS if TRANSPOSED else TOKENS
    out_columns: tl.constexpr = TOKENS if TRANSPOSED else ROWS
    total = tl.zeros((out_rows, out_columns), tl.float32)
    if BITS == 16:
        for first in range(0, K, STEP):
            tokens = _token_tile(x, x_offset, valid, first, K, STEP)
            rows = _weight_tile(weight, weight_offset, first, K, STEP)
            total = _matmul_add(tokens, rows, total, TRANSPOSED, UPCAST)
    else:
        # The product of an integer and a scale is rounded once, in bf16 as in fp32.
        scale_dtype = tl.bfloat16 if x_dtype == tl.bfloat16 and not UPCAST else tl.float32
        # Scales are too narrow for asynchronous copies: they are loaded one step ahead by hand.
        next_scales = _load_scales(scales, scales_offset, 0, groups, STEP // GROUP)
        for first in range(0, K, STEP):
            tokens = _token_tile(x, x_offset, valid, first, K, STEP)
            step_scales = next_scales
            next_scales = _load_scales(
                scales, scales_offset, first // GROUP + STEP // GROUP, groups, STEP // GROUP
            )
            if BITS == 8:
                raw = _weight_tile(weight, weight_offset, first, K, STEP)
                scale = _repeat_columns(step_scales.to(scale_dtype), ROWS, STEP // GROUP, GROUP)
                rows = raw.to(scale_dtype) * scale
                total = _matmul_add(tokens, rows.to(x_dtype), total, TRANSPOSED, UPCAST)
            else:
                raw = _weight_tile(weight, weight_offset, first // 2, (K + 1) // 2, STEP // 2)
                step_scales = step_scales.to(scale_dtype)
                scale = _repeat_columns(step_scales, ROWS, STEP // GROUP, GROUP // 2)
                high_scale = _repeat_columns(step_scales * 0.0625, ROWS, STEP // GROUP, GROUP // 2)
                # The high nibble is not shifted: it is 16 times the value, times a scale / 16.
                # Converting bytes to bf16 is cheap four at a time.
                low = ((raw & 15).to(tl.int8, bitcast=True).to(scale_dtype) - 8.0) * scale
                high = ((raw & 240) ^ 128).to(tl.int8, bitcast=True).to(scale_dtype) * high_scale
                even, odd = tl.split(tl.reshape(tokens, (TOKENS, STEP // 2, 2)))
                total = _matmul_add(even, low.to(x_dtype), total, TRANSPOSED, UPCAST)
                total = _matmul_add(odd, high.to(x_dtype), total, TRANSPOSED, UPCAST)
    return tl.trans(total) if TRANSPOSED else total


@triton.jit
def _weight_tile(weight, offset, first, K: tl.constexpr, STEP: tl.constexpr):
    """[rows, STEP] stored elements from column ``first`` on; zero past column K."""
    k = first + tl.arange(0, STEP)
    pointers = weight + (offset[:, None] + k[None, :])
    tile = tl.load(pointers) if K % STEP == 0 else tl.load(pointers, mask=(k < K)[None, :], other=0)
    return tile


@triton.jit
def _token_tile(x, offset, valid, first, K: tl.constexpr, STEP: tl.constexpr):
    """[tokens, STEP] of x; zero where a token is not ``valid``, or past column K."""
    k = first + tl.arange(0, STEP)
    pointers = x + (offset[:, None] + k[None, :])
    if K % STEP == 0:
        tile = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=valid[:, None] & (k < K)[None, :], other=0.0)
    return tile


@triton.jit
def _load_scales(scales, offset, first, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """[rows, GROUPS] scales from group ``first`` on; zero past the COUNT groups of a row."""
    group = first + tl.arange(0, GROUPS)
    pointers = scales + (offset[:, None] + group[None, :])
    return tl.load(pointers, mask=(group < COUNT)[None, :], other=0.0)


@triton.jit
def _repeat_columns(values, ROWS: tl.constexpr, GROUPS: tl.constexpr, REPEATS: tl.constexpr):
    """[ROWS, GROUPS * REPEATS]: each of values [ROWS, GROUPS] REPEATS times."""
    expanded = tl.broadcast_to(values[:, :, None], (ROWS, GROUPS, REPEATS))
    return tl.reshape(expanded, (ROWS, GROUPS * REPEATS))


@triton.jit
def _matmul_add(tokens, rows, total, TRANSPOSED: tl.constexpr, UPCAST: tl.constexpr):
    """``total`` + tokens [t, k] times rows [r, k]: [t, r], or [r, t] if TRANSPOSED.

    UPCAST is for Triton's interpreter: its bf16 arithmetic is wrong.
    """
    if UPCAST:
        a, b = tokens.to(tl.float32), rows.to(tl.float32)
    else:
        a, b = tokens, rows
    if TRANSPOSED:
        out = tl.dot(b, tl.trans(a), total, input_precision="ieee")
    else:
        out = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    return out
