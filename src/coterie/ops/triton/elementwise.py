"""Row-wise kernels: RMS norm, silu_and_mul and logits summary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.ops.triton.launch import ceil_div, launch, next_power_of_two
from coterie.values import LogitsSummary

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROW_SIZE = 16384  # elements that a program holds
SILU_COLUMNS = 1024
LOGITS_CHUNK = 4096  # logits per program


def supports_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether ``rms_norm`` supports these tensors."""
    return x.dtype == weight.dtype and x.dtype in FLOAT_DTYPES and 0 < x.shape[-1] <= MAX_ROW_SIZE


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See ``ops.rms_norm``."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    padded = next_power_of_two(size)
    launch(
        _rms_norm_kernel,
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


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See ``ops.activate_and_mul``: with silu."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    grid = (out.numel() // width, ceil_div(width, SILU_COLUMNS))
    launch(_silu_and_mul_kernel, grid, gate_up, out, WIDTH=width, CHUNK=SILU_COLUMNS, num_warps=4)
    return out


def summarize_logits(logits: Tensor, mask_id: int) -> LogitsSummary:
    """See ``ops.summarize_logits``. Logits are fp32; NaN or infinite ones make logsumexp NaN."""
    logits = logits.contiguous()
    (rows, size), device = logits.shape, logits.device
    chunks = ceil_div(size, LOGITS_CHUNK)
    values = torch.empty(4, rows, chunks, dtype=torch.float32, device=device)
    ids = torch.empty(2, rows, chunks, dtype=torch.int32, device=device)
    launch(
        _summarize_chunk_kernel,
        (rows, chunks),
        logits,
        values,
        ids,
        rows,
        size,
        mask_id,
        CHUNK=LOGITS_CHUNK,
        num_warps=8,
    )
    best = torch.empty(2, rows, dtype=torch.int64, device=device)
    total = torch.empty(rows, dtype=torch.float32, device=device)
    padded = next_power_of_two(chunks)
    launch(
        _merge_chunks_kernel,
        (rows,),
        values,
        ids,
        best,
        total,
        rows,
        chunks,
        PADDED=padded,
        num_warps=1,
    )
    return LogitsSummary.from_logits(logits, best[0], best[1], total)


@triton.jit
def _summarize_chunk_kernel(
    logits,
    values,  # [4, rows, chunks] fp32: maximum, maximum without the mask, exp sum, non-finite count
    ids,  # [2, rows, chunks] int32: the indices of the two maxima
    rows,
    size,
    mask_id,
    CHUNK: tl.constexpr,
):
    """One chunk of one row."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = index < size
    values_in = tl.load(logits + row.to(tl.int64) * size + index, mask=inside, other=0.0)
    # Non-finite logits are ignored here and counted below.
    finite = inside & (tl.abs(values_in) < float("inf"))
    x = tl.where(finite, values_in, float("-inf"))
    peak = tl.max(x, axis=0)
    base = tl.where(peak > float("-inf"), peak, 0.0)
    unmasked = tl.where(index == mask_id, float("-inf"), x)
    unmasked_peak = tl.max(unmasked, axis=0)
    target, plane_stride = row * tl.num_programs(1) + chunk, rows * tl.num_programs(1)
    tl.store(ids + target, tl.min(tl.where(x == peak, index, size - 1), axis=0))
    tl.store(
        ids + plane_stride + target,
        tl.min(tl.where(unmasked == unmasked_peak, index, size - 1), axis=0),
    )
    tl.store(values + target, peak)
    tl.store(values + plane_stride + target, unmasked_peak)
    tl.store(values + 2 * plane_stride + target, tl.sum(tl.exp(x - base), axis=0))
    non_finite = tl.where(inside, tl.where(finite, 0.0, 1.0), 0.0)
    tl.store(values + 3 * plane_stride + target, tl.sum(non_finite, axis=0))


@triton.jit
def _merge_chunks_kernel(values, ids, best, total, rows, chunks, PADDED: tl.constexpr):
    """Combines the chunks of one row."""
    row = tl.program_id(0)
    chunk = tl.arange(0, PADDED)
    inside, index, plane_stride = chunk < chunks, row * chunks + chunk, rows * chunks
    chunk_peaks = tl.load(values + index, mask=inside, other=float("-inf"))
    unmasked_peaks = tl.load(values + plane_stride + index, mask=inside, other=float("-inf"))
    peak_ids = tl.load(ids + index, mask=inside, other=2147483647)
    unmasked_ids = tl.load(ids + plane_stride + index, mask=inside, other=2147483647)
    peak, unmasked_peak = tl.max(chunk_peaks, axis=0), tl.max(unmasked_peaks, axis=0)
    best_id = tl.min(tl.where((chunk_peaks == peak) & inside, peak_ids, 2147483647), axis=0)
    unmasked_id = tl.min(
        tl.where((unmasked_peaks == unmasked_peak) & inside, unmasked_ids, 2147483647), axis=0
    )
    # Nothing equals the maximum if all are NaN: any id will do.
    fallback = tl.min(peak_ids, axis=0)
    tl.store(best + row, tl.where(best_id == 2147483647, fallback, best_id).to(tl.int64))
    tl.store(
        best + rows + row, tl.where(unmasked_id == 2147483647, fallback, unmasked_id).to(tl.int64)
    )
    sums = tl.load(values + 2 * plane_stride + index, mask=inside, other=0.0)
    base = tl.where(peak > float("-inf"), peak, 0.0)
    exp_sum = tl.sum(sums * tl.exp(chunk_peaks - base), axis=0)
    non_finite = tl.sum(tl.load(values + 3 * plane_stride + index, mask=inside, other=0.0), axis=0)
    tl.store(
        total + row,
        tl.where(non_finite > 0, float("nan"), base + tl.log(tl.maximum(exp_sum, 1e-30))),
    )


@triton.jit
def _rms_norm_kernel(
    x, weight, out, SIZE: tl.constexpr, PADDED: tl.constexpr, EPSILON: tl.constexpr
):
    """One row."""
    column = tl.arange(0, PADDED)
    inside = column < SIZE
    row_offset = tl.program_id(0).to(tl.int64) * SIZE
    x_fp32 = tl.load(x + row_offset + column, mask=inside, other=0.0).to(tl.float32)
    square = tl.sum(x_fp32 * x_fp32, axis=0)
    x_fp32 *= tl.rsqrt(square / SIZE + EPSILON) + (square - square)  # NaN if it overflows
    rounded = x_fp32.to(out.dtype.element_ty).to(tl.float32)  # rounded, then multiplied
    scaled = rounded * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row_offset + column, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_and_mul_kernel(gate_up, out, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK columns of one row: silu(first half) * second half."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (silu * up).to(out.dtype.element_ty), mask=inside)
