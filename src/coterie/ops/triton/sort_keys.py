"""How kernels compare: as whole numbers, the larger first, and of equals the lower index.

Indices are columns, which padding may follow: see ``election``.
"""

# Kernels are in the language of Triton, which types of Python do not describe.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-0x80000000)  # below the order of every number
LOWEST_KEY64 = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # the same in 64 bits


@triton.jit
def float_to_key(x):
    """fp32 -> int32 that sorts as the numbers do; -0 must not occur."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_to_float(key):
    """What ``float_order`` was given."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def double_to_key(x):
    """fp64 -> int64 that sorts as the numbers do."""
    bits = x.to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@triton.jit
def key_to_double(key):
    """What ``double_order`` was given."""
    bits = key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def topk_columns(
    inner,  # [n, W] int32: keys that come first, LOW where there is none
    outer,  # the others' keys, read if TWO
    inner_count,  # [n] int32: how many there are of the first
    column,  # [W]
    choice,  # [CHOICES], at least ROUNDS
    marked,  # [n, W] bool: gains the first MARKS columns
    ROUNDS: tl.constexpr,
    MARKS: tl.constexpr,
    TWO: tl.constexpr,
    W: tl.constexpr,
):
    """Each row's ROUNDS best columns [n, CHOICES], -1 where there are too few; what is left of the
    keys; the last key taken [n]; what is marked."""
    best = tl.max(inner, axis=1)
    columns = tl.full((inner.shape[0], choice.shape[0]), -1, tl.int32)
    for rank in range(ROUNDS):
        keys = inner
        if TWO:
            keys = tl.where((rank < inner_count)[:, None], inner, outer)
        best = tl.max(keys, axis=1)
        best_column = tl.min(tl.where(keys == best[:, None], column[None, :], W), axis=1)
        hit = column[None, :] == best_column[:, None]
        column_or_none = tl.where(best == LOWEST_KEY, -1, best_column)
        columns = tl.where((choice == rank)[None, :], column_or_none[:, None], columns)
        inner = tl.where(hit, LOWEST_KEY, inner)
        if TWO:
            outer = tl.where(hit, LOWEST_KEY, outer)
        if MARKS > 0:
            marked = marked | (hit & (rank < MARKS))
    return columns, inner, outer, best, marked


@triton.jit
def first_candidates(key, candidate, count, descending, rank):
    """Mask [W]: the ``seats`` candidates whose key is largest; of equals those that come first.

    ``descending`` [W] are the candidates' keys, sorted.
    """
    threshold = tl.sum(tl.where(rank == count - 1, descending, 0), axis=0)
    above = candidate & (key > threshold)
    tied = candidate & (key == threshold)
    ties_left = count - tl.sum(above.to(tl.int32), axis=0)
    return (above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= ties_left))) & (count > 0)
