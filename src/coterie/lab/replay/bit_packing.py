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

SCALE_HEADER = struct.Struct("<3f")  # least next, span of the nexts, largest margin
MARGIN_LEVELS = 16  # of a margin
NEXT_LEVELS = 255  # steps of a next


def bits_per_id(experts: int) -> int:
    """Bits of an expert's index."""
    return max(1, (experts - 1).bit_length())


def pack_ids(ids: Ids, experts: int) -> bytes:
    """Indices of any shape, in order, the low bit first."""
    bits = (ids.reshape(-1, 1) >> np.arange(bits_per_id(experts))) & 1
    return np.packbits(bits.astype(bool).reshape(-1), bitorder="little").tobytes()


def unpack_ids(data: bytes, count: int, experts: int) -> Ids:
    """[count], as ``packed_ids`` was given them."""
    size = bits_per_id(experts)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little", count=count * size)
    return (bits.reshape(count, size).astype(np.int16) << np.arange(size)).sum(1, dtype=np.int16)


def pack_mask(mask: Mask) -> bytes:
    return np.packbits(mask.reshape(-1), bitorder="little").tobytes()


def unpack_mask(data: bytes, count: int) -> Mask:
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little", count=count) > 0


def pack_scores(rank: Floats, next_score: Floats) -> bytes:
    """12 + N + ceil(N * k / 2) bytes.

    Afterwards a next is off by at most 1/510 of the nexts' span, and a margin by at most a
    sixteenth of the largest; a margin of share s by about sqrt(s) of that, but never under 1/256
    of the largest. Order is kept, though not every difference.
    """
    low, high = float(next_score.min()), float(next_score.max())
    span = high - low
    margins = np.maximum(rank - next_score[:, None], 0)
    max_margin = float(margins.max())
    next_codes = np.rint((next_score - low) * (NEXT_LEVELS / span if span > 0 else 0)).astype(
        np.uint8
    )
    roots = np.sqrt(margins / max_margin) if max_margin > 0 else np.zeros_like(margins)
    margin_codes = (
        np.clip(np.rint(roots * MARGIN_LEVELS) - 1, 0, MARGIN_LEVELS - 1)
        .astype(np.uint8)
        .reshape(-1)
    )
    margin_codes = np.append(margin_codes, np.zeros(len(margin_codes) % 2, np.uint8))
    return (
        SCALE_HEADER.pack(low, span, max_margin)
        + next_codes.tobytes()
        + (margin_codes[::2] | margin_codes[1::2] << 4).tobytes()
    )


def unpack_scores(data: bytes, tokens: int, k: int) -> tuple[Floats, Floats]:
    """rank [N, k] and next [N]; every rank lies above its next, unless all margins were nothing."""
    low, span, max_margin = SCALE_HEADER.unpack_from(data)
    codes = np.frombuffer(data, np.uint8, offset=SCALE_HEADER.size)
    next_score = np.float32(low) + codes[:tokens].astype(np.float32) * np.float32(
        span / NEXT_LEVELS
    )
    packed_pairs = codes[tokens:]
    margin_codes = np.stack([packed_pairs & 15, packed_pairs >> 4], axis=1).reshape(-1)[
        : tokens * k
    ]
    shares = ((margin_codes.astype(np.float32) + 1) / MARGIN_LEVELS) ** 2
    rank = next_score[:, None] + (shares * np.float32(max_margin)).reshape(tokens, k)
    return rank.astype(np.float32), next_score


def scores_size(tokens: int, k: int) -> int:
    """Bytes of ``packed_scores``."""
    return SCALE_HEADER.size + tokens + -(-tokens * k // 2)


def ids_size(count: int, experts: int) -> int:
    """Bytes of ``packed_ids``."""
    return -(-count * bits_per_id(experts) // 8)


def mask_size(count: int) -> int:
    """Bytes of ``packed_mask``."""
    return -(-count // 8)
