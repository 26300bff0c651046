"""Traces: what gates thought in real forwards, small enough to keep, on disk.

A file is one line of JSON (``About``), the selection bias where the model has one ([L, E] float32),
and records, one for each row of each forward. All is little-endian; numpy alone reads it. A record:

    size u32, crc32 u32 of what follows; then one byte, 1 where the rest is compressed (zlib); then
    number u32, row u32, forward u32, block i32, start i32, tokens u16, flags u16;
    voters, masked, filled: a bit a token each;
    of each layer: scores (``coding.packed_scores``), own ids (``coding.packed_ids``);
    used: a bit an expert and layer, where these are not just the own ids' (flag 1).

The next two bits of the flags say what a forward was for: to decode, commit, prefill or refresh.
Of the last two only what they used is kept: tokens is 0.

With 32 tokens, 19 layers, 256 experts and 8 a token that is at most 8,177 bytes, and 608 more
before compression where a policy chose other experts than the tokens' own.

What a replay can say of a policy. Ids are exact, in order, so these elect exactly what they would
have: vanilla, topk, des-seq, random, and any coreset by vote=count. Scores are in few bits, with
the errors told in ``coding.packed_scores``, so these elect nearly what they would have: coresets by
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

from coterie.keys import Key, from_json, to_json
from coterie.naming import CoterieError
from coterie.planning import coding
from coterie.planning.coding import Floats, Ids, Mask

FORMAT, VERSION = "coterie trace", 1
Kind = Literal["decode", "commit", "prefill", "refresh"]
BEGINNING = json.dumps({"format": FORMAT})[:-1].encode() + b","
KINDS: tuple[Kind, ...] = ("decode", "commit", "prefill", "refresh")
WHOLE = ("decode", "commit")  # whose scores are kept: they compute a block, the others a row
FRAME = struct.Struct("<II")
HEAD = struct.Struct("<IIIiiHH")
OTHERS_USED = 1
LONGEST = 1 << 26  # bytes of a header or a record; more is damage


@dataclass(frozen=True)
class About:
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
    commit: Annotated[str, Key("commit")] = "vanilla"  # what routed the forwards that commit
    prompts: Annotated[Mapping[str, object], Key("prompts")] = field(default_factory=dict)
    made: Annotated[Mapping[str, object], Key("made")] = field(
        default_factory=dict
    )  # command, commit, parameters ..


@dataclass(frozen=True)
class Forward:
    """One row in one forward: N tokens, L layers that route, E experts, k a token.

    N is 0 where only ``used`` was kept.
    """

    number: int  # of the forward; rows that shared it have one number
    row: int
    forward: int  # decoding forwards of this row before it
    block: int  # where its live block starts, counted from the first new token
    start: int  # where its window starts
    voters: Mask  # [N]
    masked: Mask  # [N]
    filled: Mask  # [N]
    ids: Ids  # [L, N, k] the unmodified model's choice, best first
    rank: Floats  # [L, N, k] what these score
    following: Floats  # [L, N] what the next one would score
    used: Mask  # [L, E] what was computed with
    kind: Kind = "decode"

    @property
    def tokens(self) -> int:
        return len(self.voters)

    @property
    def own(self) -> Mask:
        """[L, E]: what the unmodified model would have computed with, where that was kept."""
        if not self.tokens:
            return self.used
        mask = np.zeros(self.used.shape, dtype=bool)
        np.put_along_axis(mask, self.ids.reshape(len(mask), -1).astype(np.int64), True, axis=1)
        return mask


@dataclass(frozen=True)
class Trace:
    """A whole file. ``torn``: its last record was cut off, as when a run was killed."""

    about: About
    bias: Floats | None  # [L, E], in rank and not in the router's probability
    forwards: tuple[Forward, ...]
    torn: bool = False


class Writer:
    """Writes a trace as it comes; every record is whole on its way before the next is begun."""

    def __init__(self, path: Path, about: About, bias: Floats | None = None) -> None:
        self.about, self.records, self.bytes = about, 0, 0
        raw = b"" if bias is None else bias.astype("<f4").tobytes()
        head = {"format": FORMAT, "version": VERSION, "bias_crc32": zlib.crc32(raw)}
        head |= {"bias_shape": None if bias is None else list(bias.shape)} | to_json(about)
        self._file: BinaryIO = path.open("wb")
        self._file.write(json.dumps(head, allow_nan=False).encode() + b"\n" + raw)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, forward: Forward) -> None:
        record = framed(encoded(forward, self.about.experts))
        self._file.write(record)
        self._file.flush()
        self.records += 1
        self.bytes += len(record)


def read(path: Path) -> Trace:
    """The whole trace, without a last record that was cut off.

    Raises CoterieError where it is no trace, of another version, or damaged before its end.
    """
    with path.open("rb") as file:
        about, bias = _header(file, path)
        forwards, torn = [], False
        for body in _records(file, path):
            if body is None:
                torn = True
            else:
                forwards.append(decoded(body, about))
    return Trace(about, bias, tuple(forwards), torn)


def is_trace(path: Path) -> bool:
    """Whether a file begins as traces do; raises CoterieError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(BEGINNING)) == BEGINNING
    except OSError as error:
        raise CoterieError(f"{path}: cannot be read ({error.strerror})") from None


def encoded(forward: Forward, experts: int) -> bytes:
    """A record's content."""
    others = not forward.tokens or not np.array_equal(forward.used, forward.own)
    parts = [
        HEAD.pack(
            *(forward.number, forward.row, forward.forward, forward.block, forward.start),
            *(forward.tokens, OTHERS_USED * others | KINDS.index(forward.kind) << 1),
        ),
        *map(coding.packed_mask, (forward.voters, forward.masked, forward.filled)),
    ]
    kept = zip(forward.ids, forward.rank, forward.following, strict=True)
    for ids, rank, following in kept if forward.tokens else ():
        parts += [coding.packed_scores(rank, following), coding.packed_ids(ids, experts)]
    if others:
        parts.append(coding.packed_mask(forward.used))
    return b"".join(parts)


def framed(body: bytes) -> bytes:
    """With its size and checksum before it, compressed where that is shorter."""
    small = zlib.compress(body, 6)
    content = b"\1" + small if len(small) < len(body) else b"\0" + body
    return FRAME.pack(len(content), zlib.crc32(content)) + content


def decoded(body: bytes, about: About) -> Forward:
    """The record of this content."""
    number, row, forward, block, start, tokens, flags = HEAD.unpack_from(body)
    layers, experts, k = len(about.layers), about.experts, about.k
    kind, at = KINDS[flags >> 1 & 3], HEAD.size

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return body[at - size : at]

    voters, masked, filled = (
        coding.mask_of(take(coding.mask_size(tokens)), tokens) for _ in range(3)
    )
    scores, ids = [], []
    for _ in range(layers):
        if not tokens:
            scores.append((np.zeros((0, k), np.float32), np.zeros(0, np.float32)))
            ids.append(np.zeros((0, k), np.int16))
            continue
        scores.append(coding.scores_of(take(coding.scores_size(tokens, k)), tokens, k))
        packed = take(coding.ids_size(tokens * k, experts))
        ids.append(coding.ids_of(packed, tokens * k, experts).reshape(tokens, k))
    found = Forward(
        *(number, row, forward, block, start, voters, masked, filled),
        ids=np.stack(ids),
        rank=np.stack([rank for rank, _ in scores]),
        following=np.stack([following for _, following in scores]),
        used=np.zeros((layers, experts), dtype=bool),
        kind=kind,
    )
    if flags & OTHERS_USED:
        count = layers * experts
        used = coding.mask_of(take(coding.mask_size(count)), count).reshape(layers, experts)
    else:
        used = found.own
    return replace(found, used=used)


def _header(file: BinaryIO, path: Path) -> tuple[About, Floats | None]:
    line = file.readline(LONGEST)
    try:
        head = json.loads(line)
        known = isinstance(head, dict) and head.pop("format", None) == FORMAT
    except ValueError:
        head, known = {}, False
    if not known or not line.endswith(b"\n"):
        raise CoterieError(f"{path}: no trace; `coterie trace -o NEW` makes one")
    if (version := head.pop("version", None)) != VERSION:
        raise CoterieError(f"{path}: a trace of version {version}; this reads version {VERSION}")
    shape, checksum = head.pop("bias_shape"), head.pop("bias_crc32")
    raw = file.read(4 * int(np.prod(shape))) if shape else b""
    if zlib.crc32(raw) != checksum:
        raise CoterieError(f"{path}: the router's bias is cut off or damaged")
    bias = np.frombuffer(raw, "<f4").reshape(shape) if shape else None
    return from_json(About, {**head, "layers": tuple(head["layers"])}), bias


def _records(file: BinaryIO, path: Path) -> Iterator[bytes | None]:
    """Contents in order; None at the end where the last one is not whole."""
    count = 0
    while frame := file.read(FRAME.size):
        size, checksum = FRAME.unpack(frame) if len(frame) == FRAME.size else (LONGEST, 0)
        content = file.read(size) if size < LONGEST else b""
        if len(content) < size:
            yield None
            return
        if zlib.crc32(content) != checksum:
            raise CoterieError(f"{path}: record {count} is damaged (checksum)")
        yield zlib.decompress(content[1:]) if content[0] else content[1:]
        count += 1
