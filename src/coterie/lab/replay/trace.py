"""Traces: what gates thought in real forwards, small enough to keep, on disk.

A file is one line of JSON (``About``), the selection bias where the model has one ([L, E] float32),
and records, one for each row of each forward. All is little-endian; numpy alone reads it. A record:

    size u32, crc32 u32 of what follows; then one byte, 1 where the rest is compressed (zlib); then
    number u32, row u32, forward u32, block i32, start i32, tokens u16, flags u16;
    voters, masked, filled: a bit a token each;
    of each layer: scores (``bit_packing.packed_scores``), own ids (``bit_packing.packed_ids``);
    used: a bit an expert and layer, where these are not just the own ids' (flag 1).

The next two bits of the flags say what a forward was for: to decode, commit, prefill or refresh.
Of the last two only what they used is kept: tokens is 0.

With 32 tokens, 19 layers, 256 experts and 8 a token that is at most 8,177 bytes, and 608 more
before compression where a policy chose other experts than the tokens' own.

What a replay can say of a policy. Ids are exact, in order, so these elect exactly what they would
have: vanilla, topk, des-seq, random, and any coreset by vote=count. Scores are in few bits, with
the errors told in ``bit_packing.packed_scores``, so these elect nearly what they would have: coresets by
vote=topk-prob, weight or margin, in either tally, and naee. Not kept, so an error: scores of
experts that no token would take (xshare, racing, vote=full, vote=max), uncertainty
(voters=uncertain), and importance (mc-moe). What a policy would have changed is not in the trace of
another: tokens, steps and hidden states stay those of the run.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, BinaryIO, Literal

import numpy as np

from coterie.errors import CoterieError
from coterie.keys import Key, from_json, to_json
from coterie.lab.replay import bit_packing
from coterie.lab.replay.bit_packing import Floats, Ids, Mask

FORMAT, VERSION = "coterie trace", 1
ForwardKind = Literal["decode", "commit", "prefill", "refresh"]
MAGIC = json.dumps({"format": FORMAT})[:-1].encode() + b","
KINDS: tuple[ForwardKind, ...] = ("decode", "commit", "prefill", "refresh")
SCORED_KINDS = ("decode", "commit")  # whose scores are kept: they compute a block, the others a row
FRAME_HEADER = struct.Struct("<II")
RECORD_HEADER = struct.Struct("<IIIiiHH")
HAS_USED_MASK = 1
MAX_BYTES = 1 << 26  # bytes of a header or a record; more is damage


@dataclass(frozen=True)
class TraceHeader:
    """What was run. ``expert_bytes`` says what one expert weighs in each precision."""

    model: Annotated[str, Key("model")]
    policy: Annotated[str, Key("policy")]
    plan: Annotated[str, Key("plan")]
    unmask: Annotated[str, Key("unmask")]
    layers: Annotated[tuple[int, ...], Key("layers")]  # those that route
    experts: Annotated[int, Key("experts")]
    k: Annotated[int, Key("k")]
    expert_bytes: Annotated[Mapping[str, int], Key("expert_bytes")]
    biased_weight: Annotated[bool, Key("biased_weight")] = False
    commit_routing: Annotated[str, Key("commit")] = (
        "vanilla"  # what routed the forwards that commit
    )
    prompts: Annotated[Mapping[str, object], Key("prompts")] = field(default_factory=dict)
    provenance: Annotated[Mapping[str, object], Key("made")] = field(
        default_factory=dict
    )  # command, commit, parameters ..


@dataclass(frozen=True)
class TraceForward:
    """One row in one forward: N tokens, L layers that route, E experts, k a token.

    N is 0 where only ``used`` was kept.
    """

    number: int  # of the forward; rows that shared it have one number
    row: int
    decode_index: int  # decoding forwards of this row before it
    block_start: int  # where its live block starts, counted from the first new token
    window_start: int  # where its window starts
    voters: Mask  # [N]
    masked: Mask  # [N]
    filled: Mask  # [N]
    vanilla_ids: Ids  # [L, N, k] the unmodified model's choice, best first
    rank: Floats  # [L, N, k] what these score
    next_score: Floats  # [L, N] what the next one would score
    used: Mask  # [L, E] what was computed with
    kind: ForwardKind = "decode"

    @property
    def tokens(self) -> int:
        return len(self.voters)

    @property
    def vanilla_mask(self) -> Mask:
        """[L, E]: what the unmodified model would have computed with, where that was kept."""
        if not self.tokens:
            return self.used
        mask = np.zeros(self.used.shape, dtype=bool)
        np.put_along_axis(
            mask, self.vanilla_ids.reshape(len(mask), -1).astype(np.int64), True, axis=1
        )
        return mask


@dataclass(frozen=True)
class Trace:
    """A whole file. ``torn``: its last record was cut off, as when a run was killed."""

    header: TraceHeader
    bias: Floats | None  # [L, E], in rank and not in the router's probability
    forwards: tuple[TraceForward, ...]
    truncated: bool = False


class TraceWriter:
    """Writes a trace as it comes; every record is whole on its way before the next is begun."""

    def __init__(self, path: Path, header: TraceHeader, bias: Floats | None = None) -> None:
        self.header, self.records, self.bytes = header, 0, 0
        raw = b"" if bias is None else bias.astype("<f4").tobytes()
        fields = {"format": FORMAT, "version": VERSION, "bias_crc32": zlib.crc32(raw)}
        fields |= {"bias_shape": None if bias is None else list(bias.shape)} | to_json(header)
        self._file: BinaryIO = path.open("wb")
        self._file.write(json.dumps(fields, allow_nan=False).encode() + b"\n" + raw)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, forward: TraceForward) -> None:
        record = frame_record(encode_forward(forward, self.header.experts))
        self._file.write(record)
        self._file.flush()
        self.records += 1
        self.bytes += len(record)


def read_trace(path: Path) -> Trace:
    """The whole trace, without a last record that was cut off.

    Raises CoterieError where it is no trace, of another version, or damaged before its end.
    """
    with path.open("rb") as file:
        header, bias = _read_header(file, path)
        forwards, truncated = [], False
        for body in _read_records(file, path):
            if body is None:
                truncated = True
            else:
                forwards.append(decode_forward(body, header))
    return Trace(header, bias, tuple(forwards), truncated)


def is_trace(path: Path) -> bool:
    """Whether a file begins as traces do; raises CoterieError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise CoterieError(f"{path}: cannot be read ({error.strerror})") from None


def encode_forward(forward: TraceForward, experts: int) -> bytes:
    """A record's content."""
    has_used_mask = not forward.tokens or not np.array_equal(forward.used, forward.vanilla_mask)
    parts = [
        RECORD_HEADER.pack(
            *(
                forward.number,
                forward.row,
                forward.decode_index,
                forward.block_start,
                forward.window_start,
            ),
            *(forward.tokens, HAS_USED_MASK * has_used_mask | KINDS.index(forward.kind) << 1),
        ),
        *map(bit_packing.pack_mask, (forward.voters, forward.masked, forward.filled)),
    ]
    layers = zip(forward.vanilla_ids, forward.rank, forward.next_score, strict=True)
    for ids, rank, next_score in layers if forward.tokens else ():
        parts += [bit_packing.pack_scores(rank, next_score), bit_packing.pack_ids(ids, experts)]
    if has_used_mask:
        parts.append(bit_packing.pack_mask(forward.used))
    return b"".join(parts)


def frame_record(body: bytes) -> bytes:
    """With its size and checksum before it, compressed where that is shorter."""
    compressed = zlib.compress(body, 6)
    content = b"\1" + compressed if len(compressed) < len(body) else b"\0" + body
    return FRAME_HEADER.pack(len(content), zlib.crc32(content)) + content


def decode_forward(body: bytes, header: TraceHeader) -> TraceForward:
    """The record of this content."""
    number, row, decode_index, block, start, tokens, flags = RECORD_HEADER.unpack_from(body)
    layers, experts, k = len(header.layers), header.experts, header.k
    kind, offset = KINDS[flags >> 1 & 3], RECORD_HEADER.size

    def take(size: int) -> bytes:
        nonlocal offset
        offset += size
        return body[offset - size : offset]

    voters, masked, filled = (
        bit_packing.unpack_mask(take(bit_packing.mask_size(tokens)), tokens) for _ in range(3)
    )
    scores, ids = [], []
    for _ in range(layers):
        if not tokens:
            scores.append((np.zeros((0, k), np.float32), np.zeros(0, np.float32)))
            ids.append(np.zeros((0, k), np.int16))
            continue
        scores.append(
            bit_packing.unpack_scores(take(bit_packing.scores_size(tokens, k)), tokens, k)
        )
        packed = take(bit_packing.ids_size(tokens * k, experts))
        ids.append(bit_packing.unpack_ids(packed, tokens * k, experts).reshape(tokens, k))
    record = TraceForward(
        *(number, row, decode_index, block, start, voters, masked, filled),
        vanilla_ids=np.stack(ids),
        rank=np.stack([rank for rank, _ in scores]),
        next_score=np.stack([next_score for _, next_score in scores]),
        used=np.zeros((layers, experts), dtype=bool),
        kind=kind,
    )
    if flags & HAS_USED_MASK:
        count = layers * experts
        used = bit_packing.unpack_mask(take(bit_packing.mask_size(count)), count).reshape(
            layers, experts
        )
    else:
        used = record.vanilla_mask
    return replace(record, used=used)


def _read_header(file: BinaryIO, path: Path) -> tuple[TraceHeader, Floats | None]:
    line = file.readline(MAX_BYTES)
    try:
        fields = json.loads(line)
        recognised = isinstance(fields, dict) and fields.pop("format", None) == FORMAT
    except ValueError:
        fields, recognised = {}, False
    if not recognised or not line.endswith(b"\n"):
        raise CoterieError(f"{path}: no trace; `coterie trace -o NEW` makes one")
    if (version := fields.pop("version", None)) != VERSION:
        raise CoterieError(f"{path}: a trace of version {version}; this reads version {VERSION}")
    shape, checksum = fields.pop("bias_shape"), fields.pop("bias_crc32")
    raw = file.read(4 * int(np.prod(shape))) if shape else b""
    if zlib.crc32(raw) != checksum:
        raise CoterieError(f"{path}: the router's bias is cut off or damaged")
    bias = np.frombuffer(raw, "<f4").reshape(shape) if shape else None
    return from_json(TraceHeader, {**fields, "layers": tuple(fields["layers"])}), bias


def _read_records(file: BinaryIO, path: Path) -> Iterator[bytes | None]:
    """Contents in order; None at the end where the last one is not whole."""
    count = 0
    while frame := file.read(FRAME_HEADER.size):
        size, checksum = (
            FRAME_HEADER.unpack(frame) if len(frame) == FRAME_HEADER.size else (MAX_BYTES, 0)
        )
        content = file.read(size) if size < MAX_BYTES else b""
        if len(content) < size:
            yield None
            return
        if zlib.crc32(content) != checksum:
            raise CoterieError(f"{path}: record {count} is damaged (checksum)")
        yield zlib.decompress(content[1:]) if content[0] else content[1:]
        count += 1
