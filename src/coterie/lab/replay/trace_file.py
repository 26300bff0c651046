"""Trace files: written record by record, and read whole."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

from coterie.errors import CheckpointError, ConfigError
from coterie.files import LockedFile, opened
from coterie.keys import from_json, to_json
from coterie.lab.replay.trace import (
    FORMAT,
    FRAME_HEADER,
    MAGIC,
    MAX_BYTES,
    VERSION,
    Floats,
    Trace,
    TraceForward,
    TraceHeader,
    decode_forward,
    encode_forward,
    frame_record,
    unframe_record,
)

MAX_LAYERS, MAX_EXPERTS = 1 << 12, (1 << 15) - 1  # ids have 16 bits


class TraceWriter:
    """Writes a trace record by record; each is in the file before the next one starts.

    The file takes its name at the end. Until then, and after an error, it is NAME.part, which is a
    trace too.
    """

    def __init__(
        self,
        path: Path,
        header: TraceHeader,
        bias: Floats | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self.header, self.records = header, 0
        self._path, self._file = path, _lock_new_trace(path, overwrite=overwrite)
        raw = b"" if bias is None else bias.astype("<f4").tobytes()
        fields = {"format": FORMAT, "version": VERSION, "bias_crc32": zlib.crc32(raw)}
        fields |= {"bias_shape": None if bias is None else list(bias.shape)} | to_json(header)
        self._file.truncate()
        self._file.append(json.dumps(fields, allow_nan=False).encode() + b"\n" + raw)

    @property
    def path(self) -> Path:
        """NAME.part until the trace is complete, and then its name."""
        return self._file.path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.rename(self._path)

    def write(self, forward: TraceForward) -> None:
        self._file.append(frame_record(encode_forward(forward, self.header.experts)))
        self.records += 1


def check_new_trace(path: Path, *, overwrite: bool) -> None:
    """Raises ConfigError, before the work, for a trace that a ``TraceWriter`` would refuse."""
    with _lock_new_trace(path, overwrite=overwrite) as part:
        if not part.size:
            part.path.unlink()


def read_trace(path: Path) -> Trace:
    """A whole trace; an incomplete last record is left out.

    Raises CheckpointError for a file that is not a trace, has another version or is damaged.
    """
    with _opened_trace(path) as file:
        header, bias = _read_header(file)
        forwards = list(_read_forwards(file, header))
    complete = tuple(forward for forward in forwards if forward is not None)
    return Trace(header, bias, complete, truncated=len(complete) < len(forwards))


def is_trace(path: Path) -> bool:
    """Whether a file starts as traces do; raises CheckpointError where it cannot be read."""
    with _opened_trace(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def _lock_new_trace(path: Path, *, overwrite: bool) -> LockedFile:
    part = LockedFile(path.with_name(f"{path.name}.part"))
    if not path.exists() or (overwrite and path.is_file()):
        return part
    if not part.size:
        part.path.unlink()
    part.close()
    if not path.is_file():
        raise ConfigError(f"{path}: not a file that can be replaced")
    raise ConfigError(f"{path}: exists already; name a new file, or set `overwrite`")


@contextmanager
def _opened_trace(path: Path) -> Iterator[BinaryIO]:
    """A regular file; the errors inside get its name."""
    with opened(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
        yield file


def _read_header(file: BinaryIO) -> tuple[TraceHeader, Floats | None]:
    line = file.readline(MAX_BYTES)
    try:
        fields = json.loads(line)
        recognised = isinstance(fields, dict) and fields.pop("format", None) == FORMAT
    except (ValueError, RecursionError):
        fields, recognised = {}, False
    if not recognised or not line.endswith(b"\n"):
        raise CheckpointError("not a trace; `coterie trace -o NEW` makes one")
    if (version := fields.pop("version", None)) != VERSION:
        raise CheckpointError(f"a trace of version {version}; this reads {VERSION}")
    shape, checksum = fields.pop("bias_shape", None), fields.pop("bias_crc32", None)
    header = _parse_header(fields)
    expected = [len(header.layers), header.experts]
    if shape not in (None, expected):
        raise CheckpointError(f"header: bias_shape is not {expected}")
    raw = b"" if shape is None else file.read(4 * expected[0] * expected[1])
    bias = None if shape is None or zlib.crc32(raw) != checksum else np.frombuffer(raw, "<f4")
    if zlib.crc32(raw) != checksum or (bias is not None and not np.isfinite(bias).all()):
        raise CheckpointError("the router's bias is cut off or damaged")
    return header, None if bias is None else bias.reshape(expected)


def _parse_header(fields: Mapping[str, object]) -> TraceHeader:
    """Raises CheckpointError for a missing, an unknown or a wrong field."""
    try:
        layers = fields["layers"]
        header = from_json(TraceHeader, {**fields, "layers": tuple(layers)})  # type: ignore[arg-type]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"header: {error} is missing or wrong") from None
    texts = (header.model, header.policy, header.kv_cache, header.unmask, header.commit_routing)
    sizes = header.expert_bytes if isinstance(header.expert_bytes, dict) else {"": None}
    valid = {
        "a name": all(isinstance(text, str) for text in texts),
        "layers": 0 < len(header.layers) <= MAX_LAYERS
        and all(_is_count(layer, 0, MAX_LAYERS) for layer in header.layers),
        "experts or k": _is_count(header.experts, 1, MAX_EXPERTS)
        and _is_count(header.k, 1, header.experts),
        "expert_bytes": all(_is_count(size, 1, 1 << 40) for size in sizes.values()),
        "biased_weight": isinstance(header.biased_weight, bool),
        "prompts or made": isinstance(header.prompts, dict) and isinstance(header.provenance, dict),
    }
    if wrong := [name for name, is_valid in valid.items() if not is_valid]:
        raise CheckpointError(f"header: {wrong[0]} is wrong")
    return header


def _is_count(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _read_forwards(file: BinaryIO, header: TraceHeader) -> Iterator[TraceForward | None]:
    """Forwards in order; None at the end where the last record is incomplete."""
    count = 0
    while frame := file.read(FRAME_HEADER.size):
        if len(frame) < FRAME_HEADER.size:
            yield None
            return
        size, checksum = FRAME_HEADER.unpack(frame)
        try:
            if not 1 < size <= MAX_BYTES:
                raise CheckpointError("its size is wrong")
            content = file.read(size)
            if len(content) < size:
                yield None
                return
            if zlib.crc32(content) != checksum:
                raise CheckpointError("checksum")
            yield decode_forward(unframe_record(content, header), header)
        except CheckpointError as error:
            raise CheckpointError(f"record {count} is damaged ({error})") from None
        count += 1
