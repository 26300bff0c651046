"""The format of traces: the router's choices and scores in real forwards, in few bytes.

A file is one line of JSON (``TraceHeader``), the selection bias where the model has one
([L, E] float32), and one record for each row of each forward. All is little-endian; numpy reads it.
A record:

    size u32, crc32 u32 of what follows; then one byte, 1 where the rest is compressed (zlib); then
    number u32, row u32, forward u32, block i32, start i32, tokens u16, flags u16;
    size u32 of router blocks, offset u32 of the window in its first one (with flag 8);
    voters, masked, filled: a bit for each token;
    for each layer: scores (``pack_scores``), top-k ids (``pack_ids``);
    used: a bit for each layer and expert, where it differs from the top-k ids (flag 1);
    admitted: a bit for each router block, layer and expert (flag 8).

Two bits of the flags are the kind of forward: decode, commit, prefill or refresh. For the last two
only ``used`` is stored, and ``tokens`` is 0. With 32 tokens, 19 layers, 256 experts and top-8, a
record takes at most 8,177 bytes. A policy that changes ``used`` adds 608 bytes. Blocks that admit
experts add 616 bytes each.

Ids are exact and scores have few bits, so a replay is exact for policies that need only the ids
and nearly exact for others (``policies.fidelity``). Tokens, steps and hidden states stay those of
the recorded run: a trace does not show how another policy would change them.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from coterie.errors import CheckpointError
from coterie.keys import Key

Mask = NDArray[np.bool_]
Ids = NDArray[np.int16]
Floats = NDArray[np.float32]
ForwardKind = Literal["decode", "commit", "prefill", "refresh"]

FORMAT, VERSION = "coterie trace", 1
MAGIC = json.dumps({"format": FORMAT})[:-1].encode() + b","
KINDS: tuple[ForwardKind, ...] = ("decode", "commit", "prefill", "refresh")
SCORED_KINDS = ("decode", "commit")  # they compute one block; the others compute a whole row
FRAME_HEADER = struct.Struct("<II")
RECORD_HEADER = struct.Struct("<IIIiiHH")
BLOCKS_HEADER = struct.Struct("<II")
SCALE_HEADER = struct.Struct("<3f")  # least next score, span of next scores, largest margin
MARGIN_LEVELS, NEXT_LEVELS = 16, 255
HAS_USED_MASK, HAS_ADMITTED = 1, 8
MAX_BYTES = 1 << 24  # of a header or a record; a larger size means damage


@dataclass(frozen=True)
class TraceHeader:
    """The recorded run: model, policy and options, and one expert's bytes in each precision."""

    model: Annotated[str, Key("model")]
    policy: Annotated[str, Key("policy")]
    kv_cache: Annotated[str, Key("plan")]
    unmask: Annotated[str, Key("unmask")]
    layers: Annotated[tuple[int, ...], Key("layers")]  # the layers with a router
    experts: Annotated[int, Key("experts")]
    k: Annotated[int, Key("k")]
    expert_bytes: Annotated[Mapping[str, int], Key("expert_bytes")]
    biased_weight: Annotated[bool, Key("biased_weight")] = False
    commit_routing: Annotated[str, Key("commit")] = "vanilla"
    prompts: Annotated[Mapping[str, object], Key("prompts")] = field(default_factory=dict)
    provenance: Annotated[Mapping[str, object], Key("made")] = field(default_factory=dict)


@dataclass(frozen=True)
class RouterBlocks:
    """The experts that each router block of a window admits (LLaDA2.2).

    Blocks have ``size`` tokens; ``offset`` tokens of the first one lie before the window.
    """

    size: int
    offset: int
    admitted: Mask  # [B, L, E]

    def admitted_by_token(self, tokens: int, ordinal: int) -> Mask:
        """[N, E]: the experts that each token's block admits in a layer."""
        return self.admitted[(np.arange(tokens) + self.offset) // self.size, ordinal]

    @staticmethod
    def count(size: int, offset: int, tokens: int) -> int:
        """The number of blocks in a window of N tokens."""
        return (offset + tokens - 1) // size + 1


@dataclass(frozen=True)
class TraceForward:
    """One row in one forward: N tokens, L layers with a router, E experts, top-k.

    N is 0 where only ``used`` is stored.
    """

    number: int  # of the forward; rows of one batch share it
    row: int
    decode_index: int  # decoding forwards of this row before it
    block_start: int  # of the active block, counted from the first new token
    window_start: int
    voters: Mask  # [N]
    masked: Mask  # [N]
    filled: Mask  # [N]
    vanilla_ids: Ids  # [L, N, k] the unmodified model's top-k ids, best first
    rank: Floats  # [L, N, k] their selection scores
    next_score: Floats  # [L, N] the score of the expert ranked k + 1
    used: Mask  # [L, E] the experts that the forward computed
    kind: ForwardKind = "decode"
    router_blocks: RouterBlocks | None = None  # None: the router admits all experts

    @property
    def tokens(self) -> int:
        return len(self.voters)

    @property
    def vanilla_mask(self) -> Mask:
        """[L, E]: the experts of the unmodified model; ``used`` where no scores are stored."""
        if not self.tokens:
            return self.used
        mask = np.zeros(self.used.shape, dtype=bool)
        ids = self.vanilla_ids.reshape(len(mask), -1).astype(np.int64)
        np.put_along_axis(mask, ids, True, axis=1)
        return mask


@dataclass(frozen=True)
class Trace:
    """A trace file in memory. ``truncated``: its last record is incomplete and left out."""

    header: TraceHeader
    bias: Floats | None  # [L, E], part of ``rank`` but not of the router's probability
    forwards: tuple[TraceForward, ...]
    truncated: bool = False

    @property
    def decode_indices(self) -> list[int]:
        """Indices of the forwards that decode."""
        return [i for i, forward in enumerate(self.forwards) if forward.kind == "decode"]

    @property
    def kinds(self) -> dict[str, int]:
        """The number of forwards of each kind."""
        return {kind: sum(each.kind == kind for each in self.forwards) for kind in KINDS}


def encode_forward(forward: TraceForward, experts: int) -> bytes:
    """The content of a record, without its size and checksum."""
    has_used = not forward.tokens or not np.array_equal(forward.used, forward.vanilla_mask)
    place = (forward.number, forward.row, forward.decode_index)
    starts = (forward.block_start, forward.window_start)
    flags = HAS_USED_MASK * has_used | KINDS.index(forward.kind) << 1
    blocks = forward.router_blocks
    flags |= HAS_ADMITTED * (blocks is not None)
    parts = [RECORD_HEADER.pack(*place, *starts, forward.tokens, flags)]
    if blocks is not None:
        parts.append(BLOCKS_HEADER.pack(blocks.size, blocks.offset))
    parts += map(pack_mask, (forward.voters, forward.masked, forward.filled))
    layers = zip(forward.vanilla_ids, forward.rank, forward.next_score, strict=True)
    for ids, rank, next_score in layers if forward.tokens else ():
        parts += [pack_scores(rank, next_score), pack_ids(ids, experts)]
    if has_used:
        parts.append(pack_mask(forward.used))
    if blocks is not None:
        parts.append(pack_mask(blocks.admitted))
    return b"".join(parts)


def frame_record(body: bytes) -> bytes:
    """A record with its size and checksum, compressed where that is shorter."""
    compressed = zlib.compress(body, 6)
    content = b"\1" + compressed if len(compressed) < len(body) else b"\0" + body
    return FRAME_HEADER.pack(len(content), zlib.crc32(content)) + content


def unframe_record(content: bytes, header: TraceHeader) -> bytes:
    """The content of a record; raises CheckpointError before a wrong size takes memory."""
    compressed, data = content[:1], content[1:]
    if compressed == b"\0":
        return data
    if compressed != b"\1":
        raise CheckpointError("it does not begin as records do")
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(data, RECORD_HEADER.size + BLOCKS_HEADER.size)
        size = record_size(body, header)
        # One byte more than the record, since the end of the stream is noticed there.
        body += stream.decompress(stream.unconsumed_tail, max(1, size + 1 - len(body)))
    except zlib.error:
        raise CheckpointError("it cannot be decompressed") from None
    if not stream.eof or stream.unused_data:
        raise CheckpointError("its size is wrong")
    return body


def record_size(body: bytes, header: TraceHeader) -> int:
    """Bytes of a whole record, from its first bytes; raises CheckpointError if it is too large."""
    if len(body) < RECORD_HEADER.size:
        raise CheckpointError("it is too short")
    *_, tokens, flags = RECORD_HEADER.unpack_from(body)
    admits = bool(flags & HAS_ADMITTED)
    if flags >> 4 or (not tokens and (admits or not flags & HAS_USED_MASK)):
        raise CheckpointError("its flags are unknown")
    layers, experts, k = len(header.layers), header.experts, header.k
    layer_size = scores_size(tokens, k) + ids_size(tokens * k, experts) if tokens else 0
    used_size = mask_size(layers * experts) if flags & HAS_USED_MASK else 0
    size = RECORD_HEADER.size + 3 * mask_size(tokens) + layers * layer_size + used_size
    if admits:
        blocks = RouterBlocks.count(*read_block_size(body), tokens)
        size += BLOCKS_HEADER.size + mask_size(blocks * layers * experts)
    if size > MAX_BYTES:
        raise CheckpointError("its size is wrong")
    return size


def decode_forward(body: bytes, header: TraceHeader) -> TraceForward:
    """The forward that ``encode_forward`` wrote; raises CheckpointError for any other content."""
    if record_size(body, header) != len(body):
        raise CheckpointError("its size is wrong")
    number, row, decode_index, block, start, tokens, flags = RECORD_HEADER.unpack_from(body)
    layers, experts, k = len(header.layers), header.experts, header.k
    admits = bool(flags & HAS_ADMITTED)
    offset = RECORD_HEADER.size + BLOCKS_HEADER.size * admits

    def take(size: int) -> bytes:
        nonlocal offset
        offset += size
        return body[offset - size : offset]

    voters, masked, filled = (unpack_mask(take(mask_size(tokens)), tokens) for _ in range(3))
    ids = np.zeros((layers, tokens, k), np.int16)
    rank = np.zeros((layers, tokens, k), np.float32)
    next_score = np.zeros((layers, tokens), np.float32)
    for layer in range(layers if tokens else 0):
        rank[layer], next_score[layer] = unpack_scores(take(scores_size(tokens, k)), tokens, k)
        packed = take(ids_size(tokens * k, experts))
        ids[layer] = unpack_ids(packed, tokens * k, experts).reshape(tokens, k)
    if not (np.isfinite(rank).all() and np.isfinite(next_score).all()):
        raise CheckpointError("its scores are not finite")
    if ids.size and int(ids.max()) >= experts:
        raise CheckpointError(f"it names expert {ids.max()} of {experts}")
    used = np.zeros((layers, experts), dtype=bool)
    forward = TraceForward(
        *(number, row, decode_index, block, start, voters, masked, filled),
        *(ids, rank, next_score, used, KINDS[flags >> 1 & 3]),
    )
    if flags & HAS_USED_MASK:
        used = unpack_mask(take(mask_size(used.size)), used.size).reshape(used.shape)
    else:
        used = forward.vanilla_mask
    if not admits:
        return replace(forward, used=used)
    place = read_block_size(body)
    shape = (RouterBlocks.count(*place, tokens), layers, experts)
    admitted = unpack_mask(take(mask_size(math.prod(shape))), math.prod(shape)).reshape(shape)
    return replace(forward, used=used, router_blocks=RouterBlocks(*place, admitted))


def read_block_size(body: bytes) -> tuple[int, int]:
    """The size of a record's router blocks, and the offset of its window in the first one."""
    if len(body) < RECORD_HEADER.size + BLOCKS_HEADER.size:
        raise CheckpointError("it is too short")
    size, offset = BLOCKS_HEADER.unpack_from(body, RECORD_HEADER.size)
    if offset >= size:
        raise CheckpointError(f"its window starts {offset} tokens into a block of {size}")
    return size, offset


def bits_per_id(experts: int) -> int:
    return max(1, (experts - 1).bit_length())


def ids_size(count: int, experts: int) -> int:
    return mask_size(count * bits_per_id(experts))


def pack_ids(ids: Ids, experts: int) -> bytes:
    """Expert indices of any shape in order, each low bit first."""
    bits = (ids.reshape(-1, 1) >> np.arange(bits_per_id(experts))) & 1
    return pack_mask(bits > 0)


def unpack_ids(data: bytes, count: int, experts: int) -> Ids:
    """[count] indices that ``pack_ids`` packed."""
    size = bits_per_id(experts)
    bits = unpack_mask(data, count * size).reshape(count, size)
    places = bits.astype(np.int16) << np.arange(size, dtype=np.int16)
    return places.sum(1, dtype=np.int16)


def mask_size(count: int) -> int:
    return -(-count // 8)


def pack_mask(mask: Mask) -> bytes:
    return np.packbits(mask.reshape(-1), bitorder="little").tobytes()


def unpack_mask(data: bytes, count: int) -> Mask:
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little", count=count) > 0


def scores_size(tokens: int, k: int) -> int:
    return SCALE_HEADER.size + tokens + -(-tokens * k // 2)


def pack_scores(rank: Floats, next_score: Floats) -> bytes:
    """A layer's scores in one forward: ``rank`` [N, k] and ``next_score`` [N].

    A next score takes 8 bits between the least and the largest one. A margin, the difference of a
    rank and its next score, takes 4 bits: the square root of its share of the largest margin, since
    most margins are small. A next score is off by at most 1/510 of the span, a margin by at most a
    sixteenth of the largest one. The order within a token is kept.
    """
    low, high = float(next_score.min()), float(next_score.max())
    span, margins = high - low, np.maximum(rank - next_score[:, None], 0)
    largest = float(margins.max())
    next_codes = np.rint((next_score - low) * (NEXT_LEVELS / span if span > 0 else 0))
    roots = np.sqrt(margins / largest) if largest > 0 else np.zeros_like(margins)
    codes = np.clip(np.rint(roots * MARGIN_LEVELS) - 1, 0, MARGIN_LEVELS - 1).astype(np.uint8)
    codes = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.uint8))
    pairs = (codes[::2] | codes[1::2] << 4).tobytes()
    return SCALE_HEADER.pack(low, span, largest) + next_codes.astype(np.uint8).tobytes() + pairs


def unpack_scores(data: bytes, tokens: int, k: int) -> tuple[Floats, Floats]:
    """rank [N, k] and next_score [N]; ranks lie above next scores unless all margins are 0."""
    low, span, largest = SCALE_HEADER.unpack_from(data)
    if not (span >= 0 and largest >= 0):  # also true for NaN
        raise CheckpointError("its scores have no scale")
    codes = np.frombuffer(data, np.uint8, offset=SCALE_HEADER.size)
    step = np.float32(span / NEXT_LEVELS)
    pairs = codes[tokens:]
    margins = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[: tokens * k]
    shares = ((margins.astype(np.float32) + 1) / MARGIN_LEVELS) ** 2
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales
        next_score = np.float32(low) + codes[:tokens].astype(np.float32) * step
        rank = next_score[:, None] + (shares * np.float32(largest)).reshape(tokens, k)
    return rank.astype(np.float32), next_score
