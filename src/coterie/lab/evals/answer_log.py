"""What a run has answered so far, on disk: one line an answer, there for good once it is told."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from coterie.errors import CoterieError
from coterie.keys import Key, from_json, names_of, to_json
from coterie.lab.evals.traffic import AnswerTraffic
from coterie.routing import update_policy_text

ANSWERS_FILE, RUN_FILE = "items.jsonl", "run.json"
AnswerKey = tuple[str, str, str]  # arm, task, id
MAX_DIFFERENCES_SHOWN = 3  # differences told where a folder holds another run


@dataclass(frozen=True)
class Answer:
    """What one arm made of one item; figures are of its row, experts and bytes a layer and forward.

    ``seconds`` passed since the arm's answer before, grading and other arms left out: they add up
    to the arm's time. ``error`` says why there is no output (then ``correct`` is false and every
    figure 0); ``found`` that it was read from the folder and not answered now.
    """

    variant: Annotated[str, Key("arm")]
    task: Annotated[str, Key("task")]
    id: Annotated[str, Key("id")]
    correct: Annotated[bool, Key("correct")]
    extracted: Annotated[str | None, Key("extracted")]
    other_metrics: Annotated[Mapping[str, bool], Key("also")]
    output: Annotated[str, Key("output")]
    finish_reason: Annotated[str, Key("finish")]  # "stop", "length" or "error"
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
    traffic: Annotated[AnswerTraffic | None, Key("served")] = (
        None  # where not all experts are in memory
    )
    from_disk: bool = field(default=False, compare=False)

    @property
    def key(self) -> AnswerKey:
        return self.variant, self.task, self.id


class AnswerLog:
    """The answers of one run; in a folder where there is one, else in memory.

    Mutable: it grows. While it is open no other process can open the same folder.
    """

    def __init__(self, folder: Path | None, run_config: Mapping[str, object]) -> None:
        """Raises CoterieError where the folder holds another run, or somebody writes there."""
        self.answers: dict[AnswerKey, Answer] = {}
        self._path = None if folder is None else folder / ANSWERS_FILE
        self._file = -1
        if folder is None or self._path is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._acquire_lock(folder)
            _check_same_run(folder, run_config, is_new=os.fstat(self._file).st_size == 0)
            for answer in self._read_answers():
                self.answers[answer.key] = answer
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswerLog:
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
            self._append(_encode_answer(answer))
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

    def _acquire_lock(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CoterieError(
                f"{folder}: another process is at work there; wait for it or name another folder"
            ) from None

    def _read_answers(self) -> Iterator[Answer]:
        """Every whole line; the torn one that a killed process may have left is cut off."""
        content = self._path.read_bytes() if self._path is not None else b""
        lines = content.split(b"\n")
        incomplete = lines.pop()
        if lines and _decode_answer(lines[-1]) is None:  # blocks that a power cut left unwritten
            incomplete = lines.pop() + b"\n" + incomplete
        if incomplete:
            os.ftruncate(self._file, len(content) - len(incomplete))
        keys: set[AnswerKey] = set()
        for number, line in enumerate(lines, start=1):
            answer = _decode_answer(line)
            if answer is None:
                raise CoterieError(f"{self._path}: line {number} is not an answer of a run")
            if answer.key in keys:
                raise CoterieError(f"{self._path}: line {number} repeats {' '.join(answer.key)}")
            keys.add(answer.key)
            yield answer


def answer_from_dict(values: Mapping[str, Any]) -> Answer:
    """Back from its JSON values, its arm as it is spelled now; raises TypeError for others."""
    values = {"served": None, **values}
    if set(values) != set(names_of(Answer)):
        raise TypeError("not the values of an answer")
    values["arm"] = update_policy_text(values["arm"])
    if values["served"] is not None:
        values["served"] = from_json(AnswerTraffic, values["served"])
    return from_json(Answer, values)


def _encode_answer(answer: Answer) -> bytes:
    record = to_json(answer)
    # Escaped to ASCII: an output may hold any character, a line separator among them.
    return (json.dumps(record, allow_nan=False) + "\n").encode("ascii")


def _decode_answer(line: bytes) -> Answer | None:
    try:
        return replace(answer_from_dict(json.loads(line)), from_disk=True)
    except (ValueError, TypeError):
        return None


def _check_same_run(folder: Path, run_config: Mapping[str, object], *, is_new: bool) -> None:
    """Writes down which run this folder holds, or raises unless it is this one."""
    path, expected = folder / RUN_FILE, json.dumps(run_config, indent=1, allow_nan=False) + "\n"
    if is_new:
        partial = path.with_suffix(".tmp")
        with partial.open("w", encoding="utf-8") as file:
            file.write(expected)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CoterieError(
            f"{path}: does not say whose answers {ANSWERS_FILE} holds ({error})"
        ) from None
    if differences := list(_differences(stored, json.loads(expected), "")):
        more = len(differences) - MAX_DIFFERENCES_SHOWN
        shown = "; ".join(differences[:MAX_DIFFERENCES_SHOWN]) + (
            f"; and {more} more" if more > 0 else ""
        )
        raise CoterieError(f"{folder}: holds another run: {shown}; name another folder")


def _differences(stored: object, expected: object, name: str) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(expected, dict):
        for key in {**stored, **expected}:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(stored.get(key), expected.get(key), inner)
    elif stored != expected:
        yield f"{name} is {_shorten(stored)} there and {_shorten(expected)} here"


def _shorten(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, dict):
        return "set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
