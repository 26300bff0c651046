"""What is done to every token alone: one launch in place of many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.ops.triton.launch import launch, pieces, power_of_two
from coterie.values import Survey

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16384  # numbers that a program holds
PIECE = 1024
CHUNK = 4096  # logits that a program looks at


def norms(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm`` takes them."""
    return x.dtype == weight.dtype and x.dtype in FLOATS and 0 < x.shape[-1] <= WIDEST


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``ops.rms_norm``."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    padded = power_of_two(size)
    launch(
        _norm,
        (x.numel() // size,),
        x,
        weight,
        out,
        SIZE=size,
        PADDED=padded,
        EPSILON=epsilon,
        num_warps=8 if padded >= 2048 else 4 if padded >= 512 else 1,
    )
    return out


def gated(both: Tensor) -> Tensor:
    """See ``ops.gated``."""
    both = both.contiguous()
    width = both.shape[-1] // 2
    out = both.new_empty(*both.shape[:-1], width)
    grid = (out.numel() // width, pieces(width, PIECE))
    launch(_gate, grid, both, out, WIDTH=width, PIECE=PIECE, num_warps=4)
    return out


def survey(logits: Tensor, mask: int) -> Survey:
    """See ``ops.survey``: logits [w, V] in fp32; infinite ones make a total NaN as well."""
    logits = logits.contiguous()
    (rows, size), device = logits.shape, logits.device
    parts = pieces(size, CHUNK)
    values = torch.empty(4, rows, parts, dtype=torch.float32, device=device)
    ids = torch.empty(2, rows, parts, dtype=torch.int32, device=device)
    launch(_look, (rows, parts), logits, values, ids, rows, size, mask, CHUNK=CHUNK, num_warps=8)
    best = torch.empty(2, rows, dtype=torch.int64, device=device)
    total = torch.empty(rows, dtype=torch.float32, device=device)
    padded = power_of_two(parts)
    launch(_settle, (rows,), values, ids, best, total, rows, parts, PADDED=padded, num_warps=1)
    return Survey.of(logits, best[0], best[1], total)


@triton.jit
def _look(
    logits,
    values,  # [4, rows, parts] fp32: greatest, greatest but the mask's, sum of e**, no numbers
    ids,  # [2, rows, parts] int32: where these two are
    rows,
    size,
    mask,
    CHUNK: tl.constexpr,
):
    """One chunk of one row."""
    row, part = tl.program_id(0), tl.program_id(1)
    at = part * CHUNK + tl.arange(0, CHUNK)
    inside = at < size
    found = tl.load(logits + row.to(tl.int64) * size + at, mask=inside, other=0.0)
    # What is no number counts for nothing, and is told of.
    real = inside & (tl.abs(found) < float("inf"))
    x = tl.where(real, found, float("-inf"))
    most = tl.max(x, axis=0)
    base = tl.where(most > float("-inf"), most, 0.0)
    rest = tl.where(at == mask, float("-inf"), x)
    second = tl.max(rest, axis=0)
    to, apart = row * tl.num_programs(1) + part, rows * tl.num_programs(1)
    tl.store(ids + to, tl.min(tl.where(x == most, at, size - 1), axis=0))
    tl.store(ids + apart + to, tl.min(tl.where(rest == second, at, size - 1), axis=0))
    tl.store(values + to, most)
    tl.store(values + apart + to, second)
    tl.store(values + 2 * apart + to, tl.sum(tl.exp(x - base), axis=0))
    broken = tl.where(inside, tl.where(real, 0.0, 1.0), 0.0)
    tl.store(values + 3 * apart + to, tl.sum(broken, axis=0))


@triton.jit
def _settle(values, ids, best, total, rows, parts, PADDED: tl.constexpr):
    """All chunks of one row."""
    row = tl.program_id(0)
    part = tl.arange(0, PADDED)
    inside, at, apart = part < parts, row * parts + part, rows * parts
    greatest = tl.load(values + at, mask=inside, other=float("-inf"))
    second = tl.load(values + apart + at, mask=inside, other=float("-inf"))
    first_id = tl.load(ids + at, mask=inside, other=2147483647)
    second_id = tl.load(ids + apart + at, mask=inside, other=2147483647)
    most, next_most = tl.max(greatest, axis=0), tl.max(second, axis=0)
    one = tl.min(tl.where((greatest == most) & inside, first_id, 2147483647), axis=0)
    two = tl.min(tl.where((second == next_most) & inside, second_id, 2147483647), axis=0)
    # Where nothing equals the greatest, there are no numbers: any id will do.
    fallback = tl.min(first_id, axis=0)
    tl.store(best + row, tl.where(one == 2147483647, fallback, one).to(tl.int64))
    tl.store(best + rows + row, tl.where(two == 2147483647, fallback, two).to(tl.int64))
    sums = tl.load(values + 2 * apart + at, mask=inside, other=0.0)
    base = tl.where(most > float("-inf"), most, 0.0)
    whole = tl.sum(sums * tl.exp(greatest - base), axis=0)
    broken = tl.sum(tl.load(values + 3 * apart + at, mask=inside, other=0.0), axis=0)
    tl.store(
        total + row, tl.where(broken > 0, float("nan"), base + tl.log(tl.maximum(whole, 1e-30)))
    )


@triton.jit
def _norm(x, weight, out, SIZE: tl.constexpr, PADDED: tl.constexpr, EPSILON: tl.constexpr):
    """One row."""
    at = tl.arange(0, PADDED)
    inside = at < SIZE
    row = tl.program_id(0).to(tl.int64) * SIZE
    wide = tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + EPSILON)
    narrow = wide.to(out.dtype.element_ty).to(tl.float32)  # rounded, then multiplied
    found = narrow * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + at, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(both, out, WIDTH: tl.constexpr, PIECE: tl.constexpr):
    """PIECE columns of one row: silu of the first half times the second."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = at < WIDTH
    gate = tl.load(both + row * 2 * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * WIDTH + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    mild = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + at, (mild * up).to(out.dtype.element_ty), mask=inside)
