"""Triton's half of the experts: weights are streamed once, along k.

A program takes one expert and a few rows of its weights. The expert's tokens come in tiles; for few
tokens that is one tile, and the weights pass by once. With TURNED, rows of weights stand where
a tensor core wants many and tokens where it is content with few.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_up_kernel(
    x,  # [tokens, HIDDEN]
    weight,  # [slots, 2 * WIDTH, STORED] of numbers as they are stored, slots APART
    scales,  # [slots, 2 * WIDTH, SCALED] bf16, SCALES_APART; not read where BITS is 16
    token,  # [pairs] int32, sorted by slot; see ``reference.Dispatch``
    begin,  # [slots + 1] int32
    active,  # [slots] int32
    h,  # [pairs, WIDTH], sorted as ``token``
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED: tl.constexpr,
    APART: tl.constexpr,
    SCALED: tl.constexpr,
    SCALES_APART: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TURNED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """silu(gate) * up: COLUMNS of it, for the pairs of one expert."""
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    place = tl.program_id(0) // tiles
    left = (tl.program_id(0) % tiles) * COLUMNS
    slot = tl.load(active + place)
    if slot >= 0:
        start = tl.load(begin + slot)
        stop = tl.load(begin + slot + 1)
        # Rows of gate and up take turns, so that two neighbours are one column of both. Rows past
        # the end are the last one again: nobody stores what comes of them.
        turn = tl.arange(0, 2 * COLUMNS)
        row = (turn % 2) * WIDTH + tl.minimum(left + turn // 2, WIDTH - 1)
        at = slot.to(tl.int64) * APART
        scales_at = slot.to(tl.int64) * SCALES_APART
        to = left + tl.arange(0, COLUMNS)
        for first in range(start, stop, TOKENS):
            spot = first + tl.arange(0, TOKENS)
            real = spot < stop
            who = tl.load(token + spot, mask=real, other=0)
            total = _stream(
                x,
                who * HIDDEN,
                real,
                weight,
                at + row * STORED,
                scales,
                scales_at + row * SCALED,
                HIDDEN,
                TOKENS,
                2 * COLUMNS,
                STEP,
                BITS,
                GROUP,
                TURNED,
                WIDE,
            )
            gate, up = tl.split(tl.reshape(total, (TOKENS, COLUMNS, 2)))
            mixed = gate / (1.0 + tl.exp(-gate)) * up
            tl.store(
                h + spot[:, None] * WIDTH + to[None, :],
                mixed.to(h.dtype.element_ty),
                mask=real[:, None] & (to < WIDTH)[None, :],
            )


@triton.jit
def down_kernel(
    h,  # [pairs, WIDTH], sorted as ``pair`` is
    weight,  # [slots, HIDDEN, STORED], APART
    scales,  # [slots, HIDDEN, SCALED], SCALES_APART
    pair,  # [pairs] int32
    begin,
    active,
    y,  # [pairs, HIDDEN] fp32, by the pair's number; rows of pairs without a slot are not written
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED: tl.constexpr,
    APART: tl.constexpr,
    SCALED: tl.constexpr,
    SCALES_APART: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TURNED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What one expert says to its pairs: COLUMNS of it."""
    tiles: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    place = tl.program_id(0) // tiles
    to = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(active + place)
    if slot >= 0:
        start = tl.load(begin + slot)
        stop = tl.load(begin + slot + 1)
        row = tl.minimum(to, HIDDEN - 1)
        at = slot.to(tl.int64) * APART
        scales_at = slot.to(tl.int64) * SCALES_APART
        for first in range(start, stop, TOKENS):
            spot = first + tl.arange(0, TOKENS)
            real = spot < stop
            number = tl.load(pair + spot, mask=real, other=0)
            total = _stream(
                h,
                spot * WIDTH,
                real,
                weight,
                at + row * STORED,
                scales,
                scales_at + row * SCALED,
                WIDTH,
                TOKENS,
                COLUMNS,
                STEP,
                BITS,
                GROUP,
                TURNED,
                WIDE,
            )
            tl.store(
                y + number[:, None] * HIDDEN + to[None, :],
                total,
                mask=real[:, None] & (to < HIDDEN)[None, :],
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
    """COLUMNS of a token's weighted sum, first choice first; nobody adds nothing."""
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(CHOICES):  # pyright: ignore[reportGeneralTypeIssues]
        number = token * CHOICES + choice
        expert = tl.load(ids + number)
        slot = tl.where(expert >= 0, tl.load(slot_of + tl.maximum(expert, 0)), -1)
        share = tl.load(weights + number)
        # What is read of a row that nobody wrote is thrown away.
        part = tl.load(y + number * HIDDEN + column, mask=column < HIDDEN, other=0.0)
        total += share * tl.where(slot >= 0, part, 0.0)
    tl.store(out + token * HIDDEN + column, total, mask=column < HIDDEN)


@triton.jit
def _stream(
    x,
    x_at,
    real,
    weight,
    weight_at,
    scales,
    scales_at,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """fp32 [TOKENS, ROWS]: ``real`` rows of x times rows of weights, each beginning at its _at."""
    kind = x.dtype.element_ty
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    tall: tl.constexpr = ROWS if TURNED else TOKENS
    broad: tl.constexpr = TOKENS if TURNED else ROWS
    total = tl.zeros((tall, broad), tl.float32)
    if BITS == 16:
        for first in range(0, K, STEP):
            tokens = _token_tile(x, x_at, real, first, K, STEP)
            rows = _weight_tile(weight, weight_at, first, K, STEP)
            total = _product(tokens, rows, total, TURNED, WIDE)
    else:
        # The product of a whole number and a scale is rounded once, in bf16 as in fp32.
        scaled = tl.bfloat16 if kind == tl.bfloat16 and not WIDE else tl.float32
        # Scales are too narrow for asynchronous copies: they are fetched a step ahead by hand.
        ahead = _scales(scales, scales_at, 0, groups, STEP // GROUP)
        for first in range(0, K, STEP):
            tokens = _token_tile(x, x_at, real, first, K, STEP)
            here = ahead
            ahead = _scales(
                scales, scales_at, first // GROUP + STEP // GROUP, groups, STEP // GROUP
            )
            if BITS == 8:
                stored = _weight_tile(weight, weight_at, first, K, STEP)
                scale = _repeated(here.to(scaled), ROWS, STEP // GROUP, GROUP)
                rows = stored.to(scaled) * scale
                total = _product(tokens, rows.to(kind), total, TURNED, WIDE)
            else:
                stored = _weight_tile(weight, weight_at, first // 2, (K + 1) // 2, STEP // 2)
                here = here.to(scaled)
                scale = _repeated(here, ROWS, STEP // GROUP, GROUP // 2)
                finer = _repeated(here * 0.0625, ROWS, STEP // GROUP, GROUP // 2)
                # A high nibble stays where it is: sixteen times the number, times a scale of that
                # much less. Turning bytes into bf16 is cheap four at a time.
                low = ((stored & 15).to(tl.int8, bitcast=True).to(scaled) - 8.0) * scale
                high = ((stored & 240) ^ 128).to(tl.int8, bitcast=True).to(scaled) * finer
                even, odd = tl.split(tl.reshape(tokens, (TOKENS, STEP // 2, 2)))
                total = _product(even, low.to(kind), total, TURNED, WIDE)
                total = _product(odd, high.to(kind), total, TURNED, WIDE)
    return tl.trans(total) if TURNED else total


@triton.jit
def _weight_tile(weight, at, first, K: tl.constexpr, STEP: tl.constexpr):
    """[rows, STEP] of what is stored, from column ``first`` on; zero past column K."""
    k = first + tl.arange(0, STEP)
    where = weight + (at[:, None] + k[None, :])
    found = tl.load(where) if K % STEP == 0 else tl.load(where, mask=(k < K)[None, :], other=0)
    return found


@triton.jit
def _token_tile(x, at, real, first, K: tl.constexpr, STEP: tl.constexpr):
    """[tokens, STEP]: zero where a token is not ``real``, or past column K."""
    k = first + tl.arange(0, STEP)
    where = x + (at[:, None] + k[None, :])
    if K % STEP == 0:
        found = tl.load(where, mask=real[:, None], other=0.0)
    else:
        found = tl.load(where, mask=real[:, None] & (k < K)[None, :], other=0.0)
    return found


@triton.jit
def _scales(scales, at, first, COUNT: tl.constexpr, SOME: tl.constexpr):
    """[rows, SOME] from number ``first`` on; a row has COUNT, and zeros after them."""
    group = first + tl.arange(0, SOME)
    where = scales + (at[:, None] + group[None, :])
    return tl.load(where, mask=(group < COUNT)[None, :], other=0.0)


@triton.jit
def _repeated(found, ROWS: tl.constexpr, SOME: tl.constexpr, EACH: tl.constexpr):
    """[ROWS, SOME * EACH]: every one of found [ROWS, SOME] EACH times."""
    wide = tl.broadcast_to(found[:, :, None], (ROWS, SOME, EACH))
    return tl.reshape(wide, (ROWS, SOME * EACH))


@triton.jit
def _product(tokens, rows, total, TURNED: tl.constexpr, WIDE: tl.constexpr):
    """``total`` + tokens [t, k] times rows [r, k]: [t, r], or [r, t] where TURNED.

    WIDE is for Triton's interpreter, whose arithmetic in bf16 is wrong.
    """
    if WIDE:
        left, right = tokens.to(tl.float32), rows.to(tl.float32)
    else:
        left, right = tokens, rows
    if TURNED:
        more = tl.dot(right, tl.trans(left), total, input_precision="ieee")
    else:
        more = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    return more
