"""A log of answers with the experts of each of their forwards."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from coterie.errors import TaskError
from coterie.files import LockedFile
from coterie.keys import to_json
from coterie.lab.evals.answer_log import Answer, answer_from_dict
from coterie.offload.eviction import Mask
from coterie.offload.simulated_store import CacheSimulator

QuestionKey = tuple[str, str]  # task, id


@dataclass(frozen=True)
class AnswerEntry:
    """One answer, with the first letter of the kind of each forward and the experts in use."""

    answer: Answer
    kinds: str
    used: Mask  # [F, L, E]

    @property
    def key(self) -> QuestionKey:
        return self.answer.task, self.answer.id

    def count_loads(self, cache: CacheSimulator, layers: Sequence[int]) -> list[int]:
        """Serve the forwards with a cache; returns the loads of each."""
        return [
            sum(cache.count_loads(layer, used) for layer, used in zip(layers, forward, strict=True))
            for forward in self.used
        ]


@dataclass(frozen=True)
class AnswerTraceLog:
    """The entries of one run on disk, one line per answer, in the order of writing."""

    file: LockedFile
    entries: dict[QuestionKey, AnswerEntry]

    @staticmethod
    @contextmanager
    def open(path: Path, shape: tuple[int, int]) -> Iterator[AnswerTraceLog]:
        """``shape``: MoE layers, experts. The file ends before its first damaged line then.

        A killed process leaves an incomplete last line. Entries after a damaged one depend on it,
        and are generated again too. Raises TaskError where another process has the file open.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with LockedFile(path, TaskError) as file:
            entries, valid_bytes = {}, 0
            for line in file.read().splitlines(keepends=True):
                if (entry := _decode_entry(line, shape)) is None:
                    break
                entries[entry.key] = entry
                valid_bytes += len(line)
            file.truncate(valid_bytes)
            yield AnswerTraceLog(file, entries)

    def add(self, entries: Sequence[AnswerEntry]) -> None:
        """Append the entries; they are on disk when this returns."""
        self.file.append(b"".join(map(_encode_entry, entries)), sync=True)
        self.entries.update((entry.key, entry) for entry in entries)


def _encode_entry(entry: AnswerEntry) -> bytes:
    compressed = zlib.compress(np.packbits(entry.used).tobytes())
    used = base64.b64encode(compressed).decode()
    line = {**to_json(entry.answer), "kinds": entry.kinds, "used": used}
    return json.dumps(line).encode() + b"\n"


def _decode_entry(line: bytes, shape: tuple[int, int]) -> AnswerEntry | None:
    """The entry of a whole line; None for any other."""
    with suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError, zlib.error):
        fields: dict[str, Any] = json.loads(line if line.endswith(b"\n") else b"")
        kinds, packed = fields.pop("kinds"), base64.b64decode(fields.pop("used"), validate=True)
        size = len(kinds) * prod(shape)
        mask = zlib.decompressobj().decompress(packed, -(-size // 8) + 1)
        bits = np.unpackbits(np.frombuffer(mask, np.uint8)).astype(bool)
        if len(mask) == -(-size // 8):
            used = bits[:size].reshape(len(kinds), *shape)
            return AnswerEntry(answer_from_dict(fields), kinds, used)
    return None
