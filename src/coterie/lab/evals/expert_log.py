"""A log of answers with the experts of each of their forwards."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
        """``shape``: MoE layers, experts. An incomplete last line of a killed process is removed.

        Raises TaskError where another process has the file open.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with LockedFile(path, TaskError) as file:
            content = file.read()
            end = content.rfind(b"\n") + 1
            file.truncate(end)
            entries = [_decode_entry(line, shape) for line in content[:end].splitlines()]
            yield AnswerTraceLog(file, {entry.key: entry for entry in entries})

    def add(self, entries: Sequence[AnswerEntry]) -> None:
        """Append the entries; they are on disk when this returns."""
        for entry in entries:
            self.file.append(_encode_entry(entry), sync=entry is entries[-1])
            self.entries[entry.key] = entry


def _encode_entry(entry: AnswerEntry) -> bytes:
    compressed = zlib.compress(np.packbits(entry.used).tobytes())
    used = base64.b64encode(compressed).decode()
    line = {**to_json(entry.answer), "kinds": entry.kinds, "used": used}
    return json.dumps(line).encode() + b"\n"


def _decode_entry(line: bytes, shape: tuple[int, int]) -> AnswerEntry:
    fields = json.loads(line)
    kinds, packed = fields.pop("kinds"), zlib.decompress(base64.b64decode(fields.pop("used")))
    shape_of_mask = (len(kinds), *shape)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=int(np.prod(shape_of_mask)))
    return AnswerEntry(answer_from_dict(fields), kinds, bits.astype(bool).reshape(shape_of_mask))
