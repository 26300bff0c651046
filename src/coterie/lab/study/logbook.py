"""What one run answered and whom each of its forwards used, on disk: a line an answer.

From whom forwards used follows what any memory would have moved, and what is in it when a run that
was stopped goes on.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coterie.errors import CoterieError
from coterie.keys import to_json
from coterie.lab.evals.answer_log import Answer, answer_from_dict
from coterie.offload.eviction import Mask
from coterie.telemetry import Recorder, RowId
from coterie.values import Routing, Scores, expert_mask

Key = tuple[str, str]  # task, id


@dataclass(frozen=True)
class AnswerEntry:
    """One answer; of each of its forwards the kind's first letter, and whom it used."""

    answer: Answer
    kinds: str
    used: Mask  # [F, L, E]

    @property
    def key(self) -> Key:
        return self.answer.task, self.answer.id


@dataclass  # not frozen: it gathers
class ExpertUseRecorder(Recorder):
    """A recorder of whom every forward of every row uses; ``kind`` tells what a row's is for."""

    kind: Callable[[int], str]
    shape: tuple[int, int]  # layers that route, experts
    _rows: tuple[int, ...] = ()
    _forwards: dict[int, list[tuple[str, list[Tensor]]]] = field(default_factory=dict)

    def on_forward(self, rows: tuple[RowId, ...]) -> None:
        self._rows = tuple(row for row in rows if isinstance(row, int))
        for row in self._rows:
            self._forwards.setdefault(row, []).append((self.kind(row), []))

    def on_routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        masks = expert_mask(routing.topk_ids.view(len(self._rows), -1), scores.router.experts)
        for row, mask in zip(self._rows, masks, strict=True):
            self._forwards[row][-1][1].append(mask)

    def pop(self, row: int | None) -> tuple[str, Mask]:
        """Kinds and uses [F, L, E] of a row, which is then forgotten; forwards that broke off are
        left out. None is a row that never was."""
        layers, experts = self.shape
        forwards = [] if row is None else self._forwards.pop(row, [])
        complete = [forward for forward in forwards if len(forward[1]) == layers]
        if not complete:
            return "", np.zeros((0, layers, experts), dtype=bool)
        used = torch.stack([torch.stack(masks) for _, masks in complete])
        return "".join(kind[0] for kind, _ in complete), used.cpu().numpy()


class AnswerTraceLog:
    """The entries of one run, in the order in which they were written. Mutable: it grows."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        """``shape``: layers that route, experts. Raises where another process writes there."""
        self.entries: dict[Key, AnswerEntry] = {}
        self._path, self._shape = path, shape
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self.close()
            raise CoterieError(f"{path}: another process is at work there") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswerTraceLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def add(self, entries: Sequence[AnswerEntry]) -> None:
        """Keeps them: on the disk when this returns."""
        for entry in entries:
            os.write(self._file, _encode_entry(entry))
            self.entries[entry.key] = entry
        os.fsync(self._file)

    def _read(self) -> None:
        """Every whole line; what a killed process has left of another is cut off."""
        content = self._path.read_bytes()
        end = content.rfind(b"\n") + 1
        os.ftruncate(self._file, end)
        for line in content[:end].splitlines():
            entry = _decode_entry(line, self._shape)
            self.entries[entry.key] = entry


def _encode_entry(entry: AnswerEntry) -> bytes:
    compressed = zlib.compress(np.packbits(entry.used).tobytes())
    used = base64.b64encode(compressed).decode()
    kept = {**to_json(entry.answer), "kinds": entry.kinds, "used": used}
    return json.dumps(kept).encode() + b"\n"


def _decode_entry(line: bytes, shape: tuple[int, int]) -> AnswerEntry:
    fields = json.loads(line)
    kinds, packed = fields.pop("kinds"), zlib.decompress(base64.b64decode(fields.pop("used")))
    shape_of_mask = (len(kinds), *shape)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=int(np.prod(shape_of_mask)))
    return AnswerEntry(answer_from_dict(fields), kinds, bits.astype(bool).reshape(shape_of_mask))
