"""Whom we are timed against, where their Python is, and how a process of theirs is spoken to."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from coterie.naming import CoterieError

HERE = Path(__file__).parent
FOLDER = Path(".peers")
"""Where ``scripts/peers`` makes a virtual environment for each of them."""

STARTING, WORKING = 240.0, 60.0  # seconds until a peer counts as hung


class PeerError(CoterieError):
    """A peer that did not start, died, hung, or computes something else."""


@dataclass(frozen=True)
class Peer:
    """Another way to compute the same layer. ``memory``: what it holds, in layers of experts.

    ``works`` can be asked for; all of them are but those in ``slow``.
    """

    name: str
    works: tuple[str, ...]
    dtypes: tuple[str, ...]
    script: str = "worker.py"
    memory: float = 1.0
    slow: tuple[str, ...] = ()
    own: bool = False  # whether our own Python has what it needs
    shows: bool = True  # its output; else it tells its own error

    def python(self, given: Mapping[str, Path]) -> Path | None:
        """The interpreter: as given, else in ``.peers``, else ours where that will do."""
        if self.name in given:
            return given[self.name]
        made = FOLDER / self.name / "bin" / "python"
        if made.exists():
            return made
        return Path(sys.executable) if self.own else None


PEERS = {
    "torch": Peer("torch", ("loop", "grouped_mm"), ("fp32", "bf16"), own=True),
    "transformers": Peer(
        "transformers",
        ("eager", "grouped_mm", "batched_mm"),
        ("fp32", "bf16"),
        slow=("batched_mm",),
    ),
    "zentorch": Peer("zentorch", ("fused_moe",), ("bf16",), memory=2.0),
    "llama.cpp": Peer(
        "llama.cpp",
        ("layer",),
        ("bf16", "int8", "int4"),
        script="llama.py",
        memory=1.5,
        shows=False,
    ),
}


@dataclass(frozen=True)
class Chosen:
    """A peer that takes part, under this interpreter. ``asked``: by name, so it must not fail."""

    peer: Peer
    python: Path
    asked: bool


def chosen(
    names: Sequence[str], pythons: Mapping[str, Path], dtype: str
) -> tuple[list[Chosen], dict[str, str]]:
    """Who takes part, and why others do not. Without names, whoever is there.

    Raises CoterieError for a name that is unknown, not installed, or has no such experts.
    """
    for name in (*names, *pythons):
        if name not in PEERS:
            raise CoterieError(f"unknown peer {name!r}; known: {', '.join(PEERS)}")
    found, skipped = [], {}
    for peer in PEERS.values():
        if names and peer.name not in names:
            continue
        asked = peer.name in names or peer.name in pythons
        python = peer.python(pythons)
        why = _absent(peer, python, dtype)
        if why is not None and asked:
            raise CoterieError(f"{peer.name}: {why}")
        if why is not None or python is None:
            skipped[peer.name] = why or ""
        else:
            found.append(Chosen(peer, python, asked))
    return found, skipped


def _absent(peer: Peer, python: Path | None, dtype: str) -> str | None:
    if dtype not in peer.dtypes:
        return f"has no experts in {dtype}; it has {', '.join(peer.dtypes)}"
    if python is None:
        return (
            f"not installed; `scripts/peers {peer.name}` makes {FOLDER / peer.name}, "
            f"or --peer-python {peer.name}=PATH names a Python that has it"
        )
    if not os.access(python, os.X_OK):
        return f"{python} is no program"
    return None


class Worker:
    """A peer's process: one line in is one turn, one line out its answer.

    Raises PeerError, in words of one line, when it answers with anything else or not in time.
    """

    def __init__(
        self,
        who: Chosen,
        folder: Path,
        *,
        threads: int,
        starting: float = STARTING,
        working: float = WORKING,
        script: Path | None = None,
    ) -> None:
        self.peer = who.peer
        self.works: tuple[str, ...] = ()
        self.versions: dict[str, str] = {}
        self._starting, self._working = starting, working
        self._chatter: deque[str] = deque(maxlen=5)
        self._answers: queue.Queue[str | None] = queue.Queue()
        usual = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        usual |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        words = [who.python, script or HERE / who.peer.script, who.peer.name, folder]
        self._process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=usual,
        )
        self._listeners = [
            threading.Thread(target=self._hear, daemon=True),
            threading.Thread(target=self._overhear, daemon=True),
        ]
        for listener in self._listeners:
            listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *why: object) -> None:
        self.close()

    def open(self) -> None:
        """Wait until it is ready."""
        word, _, told = self._answer(self._starting).partition(" ")
        if word != "ready":
            raise self._odd(f"{word} {told}")
        found = json.loads(told)
        self.works, self.versions = tuple(found["works"]), found["versions"]

    def time(self, work: str, case: int) -> float:
        """Seconds that a work takes for a case."""
        return self._number(f"time {work} {case}")

    def error(self, work: str, case: int) -> float:
        """How far its output is from what it should be, where it cannot be shown."""
        return self._number(f"check {work} {case}")

    def output(self, work: str, case: int, file: Path) -> np.ndarray:
        """What the work makes of a case, [T, H]; by way of that file."""
        answer = self._ask(f"keep {work} {case} {file}")
        if answer != "kept":
            raise self._odd(answer)
        return np.load(file)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        process = self._process
        process.kill()
        process.wait()
        for listener in self._listeners:
            listener.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()

    def _number(self, line: str) -> float:
        answer = self._ask(line)
        try:
            return float(answer)
        except ValueError:
            raise self._odd(answer) from None

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is dead: the answer will say so
        return self._answer(self._working)

    def _answer(self, patience: float) -> str:
        try:
            line = self._answers.get(timeout=patience)
        except queue.Empty:
            raise PeerError(f"{self.peer.name} said nothing for {patience:g} s") from None
        if line is None:
            status = self._process.wait()
            self._listeners[1].join()
            last = " / ".join(self._chatter) or "without a word"
            raise PeerError(f"{self.peer.name} ended with status {status}: {last}")
        if line.startswith("failed "):
            raise PeerError(f"{self.peer.name}: {line.removeprefix('failed ')}")
        return line

    def _odd(self, answer: str) -> PeerError:
        return PeerError(f"{self.peer.name} answered {answer.strip()!r}")

    def _hear(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line.rstrip("\n"))
        self._answers.put(None)

    def _overhear(self) -> None:
        """Keep the last of what it says beside the point: an error's reason, mostly."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._chatter.append(line.strip()[:200])
