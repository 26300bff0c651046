"""What is done to every token alone: one launch in place of many."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.ops.triton.launch import launch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 16384  # numbers that a program holds
PIECE = 1024


def norms(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm`` takes them."""
    return x.dtype == weight.dtype and x.dtype in FLOATS and 0 < x.shape[-1] <= WIDEST


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``ops.rms_norm``."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    padded = triton.next_power_of_2(size)
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
    grid = (out.numel() // width, triton.cdiv(width, PIECE))
    launch(_gate, grid, both, out, WIDTH=width, PIECE=PIECE, num_warps=4)
    return out


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
