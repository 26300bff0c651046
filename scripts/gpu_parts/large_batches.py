"""A plain fused layer of experts as it is written for large batches: what ours is compared with.

Pairs are sorted by expert and padded to whole tiles of 64 rows; one kernel serves both products, a
tile of pairs times a tile of columns each; torch does the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton import knobs

from coterie.values import Routing

ROWS, COLUMNS, STEP = 64, 64, 32


def run_experts(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [T, H] -> [T, H] fp32; every id names an expert of gate_up [E, 2 I, H] and down."""
    (tokens, k), experts = routing.topk_ids.shape, len(down)
    ids = routing.topk_ids.flatten()
    counts = F.one_hot(ids, experts).sum(0)
    tiles = (counts + ROWS - 1) // ROWS
    last = tiles.cumsum(0)
    most = tokens * k // ROWS + min(experts, tokens * k)  # tiles there can be at most
    expert = torch.searchsorted(last, torch.arange(most, device=x.device), right=True)
    order = ids.argsort(stable=True)
    place = torch.arange(tokens * k, device=x.device) - (counts.cumsum(0) - counts)[ids[order]]
    place += (last - tiles)[ids[order]] * ROWS
    pair = torch.full((most * ROWS,), tokens * k, device=x.device).scatter_(0, place, order)
    h = x.new_zeros(tokens * k + 1, gate_up.shape[1])
    _product(x, gate_up, (pair, expert), h, shared=k)
    gate, up = h.chunk(2, dim=-1)
    y = x.new_zeros(tokens * k + 1, down.shape[1])
    _product(F.silu(gate) * up, down, (pair, expert), y, shared=1)
    weighted = y[:-1].float() * routing.topk_weights.flatten().unsqueeze(-1)
    return weighted.view(tokens, k, -1).sum(1)


def _product(
    x: Tensor, weight: Tensor, tiles: tuple[Tensor, Tensor], out: Tensor, *, shared: int
) -> None:
    (pair, expert), (_, rows, k) = tiles, weight.shape
    grid = (len(expert), triton.cdiv(rows, COLUMNS))
    _multiply[grid](
        x.contiguous(),
        weight,
        pair,
        expert,
        out,
        len(out) - 1,
        len(weight),
        rows,
        k,
        SHARED=shared,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        STEP=STEP,
        WIDE=bool(knobs.runtime.interpret),
        num_warps=4,
        num_stages=3,
    )


@triton.jit
def _multiply(
    x,
    weight,
    pair,
    expert,
    out,
    pairs,
    experts,
    rows,
    k,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A tile of pairs, SHARED of which read one row of x, times a tile of columns."""
    whose = tl.load(expert + tl.program_id(0))
    if whose < experts:
        number = tl.load(pair + tl.program_id(0) * ROWS + tl.arange(0, ROWS))
        real = number < pairs
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, k, STEP):
            at = first + tl.arange(0, STEP)
            left = tl.load(
                x + (number // SHARED)[:, None] * k + at[None, :],
                mask=real[:, None] & (at < k)[None, :],
                other=0.0,
            )
            right = tl.load(
                weight + (whose * rows + column)[None, :] * k + at[:, None],
                mask=(column < rows)[None, :] & (at < k)[:, None],
                other=0.0,
            )
            if WIDE:
                total = tl.dot(left.to(tl.float32), right.to(tl.float32), total)
            else:
                total = tl.dot(left, right, total)
        tl.store(
            out + number[:, None] * rows + column[None, :],
            total.to(out.dtype.element_ty),
            mask=real[:, None] & (column < rows)[None, :],
        )
