"""Numbers in few bits, as a trace keeps them; numpy alone.

Scores of a layer in one forward: ``rank`` [N, k], what a token's own experts score, best first, and
``next`` [N], what the expert scores that it would take after them. Kept are the nexts in 8 bits
between their extremes, and each rank's margin above its next in 4 bits of the square root of its
share of the largest margin: small margins, which are many, are told apart best.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Ids = NDArray[np.int16]
Floats = NDArray[np.float32]

SCALES = struct.Struct("<3f")  # least next, span of the nexts, largest margin
LEVELS = 16  # of a margin
FINE = 255  # steps of a next


def width(experts: int) -> int:
    """Bits of an expert's index."""
    return max(1, (experts - 1).bit_length())


def packed_ids(ids: Ids, experts: int) -> bytes:
    """Indices of any shape, in order, the low bit first."""
    bits = (ids.reshape(-1, 1) >> np.arange(width(experts))) & 1
    return np.packbits(bits.astype(bool).reshape(-1), bitorder="little").tobytes()


def ids_of(packed: bytes, count: int, experts: int) -> Ids:
    """[count], as ``packed_ids`` was given them."""
    size = width(experts)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little", count=count * size)
    return (bits.reshape(count, size).astype(np.int16) << np.arange(size)).sum(1, dtype=np.int16)


def packed_mask(mask: Mask) -> bytes:
    return np.packbits(mask.reshape(-1), bitorder="little").tobytes()


def mask_of(packed: bytes, count: int) -> Mask:
    return np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little", count=count) > 0


def packed_scores(rank: Floats, following: Floats) -> bytes:
    """12 + N + ceil(N * k / 2) bytes.

    Afterwards a next is off by at most 1/510 of the nexts' span, and a margin by at most a
    sixteenth of the largest; a margin of share s by about sqrt(s) of that, but never under 1/256
    of the largest. Order is kept, though not every difference.
    """
    low, high = float(following.min()), float(following.max())
    span = high - low
    margins = np.maximum(rank - following[:, None], 0)
    top = float(margins.max())
    fine = np.rint((following - low) * (FINE / span if span > 0 else 0)).astype(np.uint8)
    roots = np.sqrt(margins / top) if top > 0 else np.zeros_like(margins)
    coarse = np.clip(np.rint(roots * LEVELS) - 1, 0, LEVELS - 1).astype(np.uint8).reshape(-1)
    coarse = np.append(coarse, np.zeros(len(coarse) % 2, np.uint8))
    return (
        SCALES.pack(low, span, top) + fine.tobytes() + (coarse[::2] | coarse[1::2] << 4).tobytes()
    )


def scores_of(packed: bytes, tokens: int, k: int) -> tuple[Floats, Floats]:
    """rank [N, k] and next [N]; every rank lies above its next, unless all margins were nothing."""
    low, span, top = SCALES.unpack_from(packed)
    rest = np.frombuffer(packed, np.uint8, offset=SCALES.size)
    following = np.float32(low) + rest[:tokens].astype(np.float32) * np.float32(span / FINE)
    pairs = rest[tokens:]
    coarse = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[: tokens * k]
    shares = ((coarse.astype(np.float32) + 1) / LEVELS) ** 2
    rank = following[:, None] + (shares * np.float32(top)).reshape(tokens, k)
    return rank.astype(np.float32), following


def scores_size(tokens: int, k: int) -> int:
    """Bytes of ``packed_scores``."""
    return SCALES.size + tokens + -(-tokens * k // 2)


def ids_size(count: int, experts: int) -> int:
    """Bytes of ``packed_ids``."""
    return -(-count * width(experts) // 8)


def mask_size(count: int) -> int:
    """Bytes of ``packed_mask``."""
    return -(-count // 8)
