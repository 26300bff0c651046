"""What a run has answered so far, on disk: one line an answer, there for good once it is told."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from coterie.evals.served import Served
from coterie.keys import Key, from_json, names_of, to_json
from coterie.naming import CoterieError
from coterie.routing import respell

ITEMS, RUN = "items.jsonl", "run.json"
AnswerKey = tuple[str, str, str]  # arm, task, id
NAMED = 3  # differences told where a folder holds another run


@dataclass(frozen=True)
class Answer:
    """What one arm made of one item; figures are of its row, experts and bytes a layer and forward.

    ``seconds`` passed since the arm's answer before, grading and other arms left out: they add up
    to the arm's time. ``error`` says why there is no output (then ``correct`` is false and every
    figure 0); ``found`` that it was read from the folder and not answered now.
    """

    arm: Annotated[str, Key("arm")]
    task: Annotated[str, Key("task")]
    id: Annotated[str, Key("id")]
    correct: Annotated[bool, Key("correct")]
    extracted: Annotated[str | None, Key("extracted")]
    also: Annotated[Mapping[str, bool], Key("also")]
    output: Annotated[str, Key("output")]
    finish: Annotated[str, Key("finish")]  # "stop", "length" or "error"
    new_tokens: Annotated[int, Key("new_tokens")]
    forwards: Annotated[int, Key("forwards")]  # that denoised
    blocks: Annotated[int, Key("blocks")]
    prefills: Annotated[int, Key("prefills")]
    commits: Annotated[int, Key("commits")]
    experts: Annotated[float, Key("experts")]  # unique ones, mean over layers and counted forwards
    expert_forwards: Annotated[int, Key("expert_forwards")]  # those counted
    expert_bytes: Annotated[float, Key("expert_bytes")]
    vote_mass_kept: Annotated[float, Key("vote_mass_kept")]
    seconds: Annotated[float, Key("seconds")]
    error: Annotated[str | None, Key("error")] = None
    served: Annotated[Served | None, Key("served")] = None  # where not all experts are in memory
    found: bool = field(default=False, compare=False)

    @property
    def key(self) -> AnswerKey:
        return self.arm, self.task, self.id


class Journal:
    """The answers of one run; in a folder where there is one, else in memory.

    Mutable: it grows. While it is open no other process can open the same folder.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, object]) -> None:
        """Raises CoterieError where the folder holds another run, or somebody writes there."""
        self.answers: dict[AnswerKey, Answer] = {}
        self._path = None if folder is None else folder / ITEMS
        self._file = -1
        if folder is None or self._path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock(folder)
            _same_run(folder, run, fresh=os.fstat(self._file).st_size == 0)
            for answer in self._read():
                self.answers[answer.key] = answer
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others write there."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def add(self, answers: Sequence[Answer]) -> None:
        """Keeps them: on the disk, not on the way to it, when this returns.

        Where one cannot be written this raises, and the file ends with the line before.
        """
        for answer in answers:
            if answer.key in self.answers:
                raise RuntimeError(f"answered twice: {answer.key}")
            self._append(_line(answer))
            self.answers[answer.key] = answer
        if self._path is not None and answers:
            os.fsync(self._file)

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        end = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.ftruncate(self._file, end)
            raise CoterieError(
                f"{self._path}: {error.strerror}; the {len(self.answers)} answers before are kept, "
                "and the same command goes on from them"
            ) from None

    def _lock(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CoterieError(
                f"{folder}: another process is at work there; wait for it or name another folder"
            ) from None

    def _read(self) -> Iterator[Answer]:
        """Every whole line; the torn one that a killed process may have left is cut off."""
        content = self._path.read_bytes() if self._path is not None else b""
        lines = content.split(b"\n")
        torn = lines.pop()
        if lines and _parsed(lines[-1]) is None:  # blocks that a power cut left unwritten
            torn = lines.pop() + b"\n" + torn
        if torn:
            os.ftruncate(self._file, len(content) - len(torn))
        seen: set[AnswerKey] = set()
        for number, line in enumerate(lines, start=1):
            answer = _parsed(line)
            if answer is None:
                raise CoterieError(f"{self._path}: line {number} is not an answer of a run")
            if answer.key in seen:
                raise CoterieError(f"{self._path}: line {number} repeats {' '.join(answer.key)}")
            seen.add(answer.key)
            yield answer


def answer_of(stored: Mapping[str, Any]) -> Answer:
    """Back from its JSON values, its arm as it is spelled now; raises TypeError for others."""
    stored = {"served": None, **stored}
    if set(stored) != set(names_of(Answer)):
        raise TypeError("not the values of an answer")
    stored["arm"] = respell(stored["arm"])
    if stored["served"] is not None:
        stored["served"] = from_json(Served, stored["served"])
    return from_json(Answer, stored)


def _line(answer: Answer) -> bytes:
    stored = to_json(answer)
    # Escaped to ASCII: an output may hold any character, a line separator among them.
    return (json.dumps(stored, allow_nan=False) + "\n").encode("ascii")


def _parsed(line: bytes) -> Answer | None:
    try:
        return replace(answer_of(json.loads(line)), found=True)
    except (ValueError, TypeError):
        return None


def _same_run(folder: Path, run: Mapping[str, object], *, fresh: bool) -> None:
    """Writes down which run this folder holds, or raises unless it is this one."""
    path, wanted = folder / RUN, json.dumps(run, indent=1, allow_nan=False) + "\n"
    if fresh:
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(wanted)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CoterieError(f"{path}: does not say whose answers {ITEMS} holds ({error})") from None
    if differences := list(_differences(held, json.loads(wanted), "")):
        more = len(differences) - NAMED
        told = "; ".join(differences[:NAMED]) + (f"; and {more} more" if more > 0 else "")
        raise CoterieError(f"{folder}: holds another run: {told}; name another folder")


def _differences(held: object, wanted: object, name: str) -> Iterator[str]:
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in {**held, **wanted}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(held.get(key), wanted.get(key), inner)
    elif held != wanted:
        yield f"{name} is {_brief(held)} there and {_brief(wanted)} here"


def _brief(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, dict):
        return "set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
