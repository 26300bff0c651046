"""Sorting by integer keys: larger first, lower column index on ties.

See ``election`` for the column layout with its padding.
"""

# Python's types do not describe the Triton language.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-0x80000000)  # below the key of every number
LOWEST_KEY64 = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # the same for 64 bits


@triton.jit
def float_to_key(x):
    """fp32 -> int32 with the same order; -0 must not occur."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_to_float(key):
    """The inverse of ``float_to_key``."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def double_to_key(x):
    """fp64 -> int64 with the same order."""
    bits = x.to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@triton.jit
def key_to_double(key):
    """The inverse of ``double_to_key``."""
    bits = key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def topk_columns(
    inner,  # [n, COLUMNS] int32: keys of preferred columns, LOWEST_KEY elsewhere
    outer,  # keys of the remaining columns, read if HAS_OUTER
    inner_count,  # [n] int32: number of preferred columns
    column,  # [COLUMNS]
    choice,  # [CHOICES], at least ROUNDS
    marked,  # [n, COLUMNS] bool: set for the first MARKS selected columns
    ROUNDS: tl.constexpr,
    MARKS: tl.constexpr,
    HAS_OUTER: tl.constexpr,
):
    """Each row's ROUNDS best columns, preferred columns first.

    Returns the columns [n, CHOICES] (-1 if there are too few), the keys of ``inner`` and ``outer``
    that remain, the last selected key [n], and ``marked``.
    """
    best = tl.max(inner, axis=1)
    columns = tl.full((inner.shape[0], choice.shape[0]), -1, tl.int32)
    for rank in range(ROUNDS):
        keys = inner
        if HAS_OUTER:
            keys = tl.where((rank < inner_count)[:, None], inner, outer)
        best = tl.max(keys, axis=1)
        best_column = tl.min(
            tl.where(keys == best[:, None], column[None, :], column.shape[0]), axis=1
        )
        hit = column[None, :] == best_column[:, None]
        column_or_none = tl.where(best == LOWEST_KEY, -1, best_column)
        columns = tl.where((choice == rank)[None, :], column_or_none[:, None], columns)
        inner = tl.where(hit, LOWEST_KEY, inner)
        if HAS_OUTER:
            outer = tl.where(hit, LOWEST_KEY, outer)
        if MARKS > 0:
            marked = marked | (hit & (rank < MARKS))
    return columns, inner, outer, best, marked


@triton.jit
def first_candidates(key, candidate, count, descending, rank):
    """Mask [COLUMNS]: the ``count`` candidates with the largest keys, lower columns on ties.

    ``descending`` [COLUMNS] are the candidates' keys, sorted.
    """
    threshold = tl.sum(tl.where(rank == count - 1, descending, 0), axis=0)
    above = candidate & (key > threshold)
    tied = candidate & (key == threshold)
    ties_left = count - tl.sum(above.to(tl.int32), axis=0)
    return (above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= ties_left))) & (count > 0)
