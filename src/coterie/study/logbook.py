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

from coterie.evals.journal import Answer, answer_of
from coterie.experts.eviction import Mask
from coterie.keys import to_json
from coterie.naming import CoterieError
from coterie.telemetry import Row
from coterie.values import Routing, Scores, membership

Key = tuple[str, str]  # task, id


@dataclass(frozen=True)
class Entry:
    """One answer; of each of its forwards the kind's first letter, and whom it used."""

    answer: Answer
    kinds: str
    used: Mask  # [F, L, E]

    @property
    def key(self) -> Key:
        return self.answer.task, self.answer.id


@dataclass  # not frozen: it gathers
class Uses:
    """A recorder of whom every forward of every row uses; ``kind`` tells what a row's is for."""

    kind: Callable[[int], str]
    shape: tuple[int, int]  # layers that route, experts
    _rows: tuple[int, ...] = ()
    _seen: dict[int, list[tuple[str, list[Tensor]]]] = field(default_factory=dict)

    def began(self, rows: tuple[Row, ...]) -> None:
        self._rows = tuple(row for row in rows if isinstance(row, int))
        for row in self._rows:
            self._seen.setdefault(row, []).append((self.kind(row), []))

    def fed(self, layer: int, x: Tensor) -> None:
        del layer, x

    def routed(self, layer: int, scores: Scores, routing: Routing) -> None:
        del layer
        masks = membership(routing.ids.view(len(self._rows), -1), scores.router.experts)
        for row, mask in zip(self._rows, masks, strict=True):
            self._seen[row][-1][1].append(mask)

    def layer_output(self, layer: int, x: Tensor) -> None:
        del layer, x

    def take(self, row: int | None) -> tuple[str, Mask]:
        """Kinds and uses [F, L, E] of a row, which is then forgotten; forwards that broke off are
        left out. None is a row that never was."""
        layers, experts = self.shape
        seen = [] if row is None else self._seen.pop(row, [])
        whole = [one for one in seen if len(one[1]) == layers]
        if not whole:
            return "", np.zeros((0, layers, experts), dtype=bool)
        used = torch.stack([torch.stack(masks) for _, masks in whole])
        return "".join(kind[0] for kind, _ in whole), used.cpu().numpy()


class Logbook:
    """The entries of one run, in the order in which they were written. Mutable: it grows."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        """``shape``: layers that route, experts. Raises where another process writes there."""
        self.entries: dict[Key, Entry] = {}
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

    def __enter__(self) -> Logbook:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def add(self, entries: Sequence[Entry]) -> None:
        """Keeps them: on the disk when this returns."""
        for entry in entries:
            os.write(self._file, _line(entry))
            self.entries[entry.key] = entry
        os.fsync(self._file)

    def _read(self) -> None:
        """Every whole line; what a killed process has left of another is cut off."""
        content = self._path.read_bytes()
        end = content.rfind(b"\n") + 1
        os.ftruncate(self._file, end)
        for line in content[:end].splitlines():
            entry = _entry(line, self._shape)
            self.entries[entry.key] = entry


def _line(entry: Entry) -> bytes:
    packed = zlib.compress(np.packbits(entry.used).tobytes())
    used = base64.b64encode(packed).decode()
    kept = {**to_json(entry.answer), "kinds": entry.kinds, "used": used}
    return json.dumps(kept).encode() + b"\n"


def _entry(line: bytes, shape: tuple[int, int]) -> Entry:
    known = json.loads(line)
    kinds, packed = known.pop("kinds"), zlib.decompress(base64.b64decode(known.pop("used")))
    whole = (len(kinds), *shape)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=int(np.prod(whole)))
    return Entry(answer_of(known), kinds, bits.astype(bool).reshape(whole))
