"""How kernels compare: as whole numbers, the larger first, and of equals the lower index.

Indices are columns, which padding may follow: see ``election``.
"""

# Kernels are in the language of Triton, which types of Python do not describe.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

LOW = tl.constexpr(-0x80000000)  # below the order of every number
NEVER = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # the same in 64 bits


@triton.jit
def float_order(x):
    """fp32 -> int32 that sorts as the numbers do; -0 must not occur."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def order_float(order):
    """What ``float_order`` was given."""
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def double_order(x):
    """fp64 -> int64 that sorts as the numbers do."""
    bits = x.to(tl.int64, bitcast=True)
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


@triton.jit
def order_double(order):
    """What ``double_order`` was given."""
    bits = order ^ ((order >> 63) & 0x7FFFFFFFFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def best_columns(
    inner,  # [n, W] int32: keys that come first, LOW where there is none
    outer,  # the others' keys, read if TWO
    within,  # [n] int32: how many there are of the first
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
    for place in range(ROUNDS):
        left = inner
        if TWO:
            left = tl.where((place < within)[:, None], inner, outer)
        best = tl.max(left, axis=1)
        at = tl.min(tl.where(left == best[:, None], column[None, :], W), axis=1)
        hit = column[None, :] == at[:, None]
        found = tl.where(best == LOW, -1, at)
        columns = tl.where((choice == place)[None, :], found[:, None], columns)
        inner = tl.where(hit, LOW, inner)
        if TWO:
            outer = tl.where(hit, LOW, outer)
        if MARKS > 0:
            marked = marked | (hit & (place < MARKS))
    return columns, inner, outer, best, marked


@triton.jit
def first(key, candidate, seats, descending, place):
    """Mask [W]: the ``seats`` candidates whose key is largest; of equals those that come first.

    ``descending`` [W] are the candidates' keys, sorted.
    """
    last = tl.sum(tl.where(place == seats - 1, descending, 0), axis=0)
    above = candidate & (key > last)
    level = candidate & (key == last)
    left = seats - tl.sum(above.to(tl.int32), axis=0)
    return (above | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= left))) & (seats > 0)
