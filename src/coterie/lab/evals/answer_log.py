"""The log of a run's answers on disk: one JSON line per answer, synced before it is reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CheckpointError, ConfigError, TaskError
from coterie.files import LockedFile, atomic_write
from coterie.keys import Key, from_json, keys_of, names_of, to_json
from coterie.offload.traffic import Traffic
from coterie.routing import update_policy_text
from coterie.strict_json import read_object

ANSWERS_FILE, RUN_FILE = "items.jsonl", "run.json"
AnswerKey = tuple[str, str, str]  # variant, task, item id
MAX_DIFFERENCES_SHOWN = 3
DIGESTS = {"model": "the model", "sha256": "the data", "questions": "the content of the questions"}
CONSEQUENCES = ("items", "questions")  # values that follow from options
FIELDS = {  # of options, by key of ``run.json``
    "memory": "expert_memory", "lasts": "reset_every", "coarse": "fallback_model",
    "warm": "warm_start", "imagined": "simulated", "experts": "expert_dtype",
    "dense": "dense_dtype",
}  # fmt: skip
ITEM_ERROR = re.compile(
    r"\b(?:NaN|infinite|not finite)\b|^the (?:prompt cannot be read|answer has no text): "
)


@dataclass(frozen=True)
class AnswerTraffic:
    """Experts used and bytes moved over one or more answers, passes that write keys included.

    ``bytes_vanilla`` is what the unmodified model would move on the same forwards with an LRU cache
    of the same size; None if it was not counted.
    """

    used: Annotated[int, Key("used")]
    hits: Annotated[int, Key("hits")]
    bytes_moved: Annotated[int, Key("moved")]
    bytes_without_cache: Annotated[int, Key("without_cache")]
    bytes_vanilla: Annotated[int | None, Key("vanilla")] = None
    wait_seconds: Annotated[float, Key("waited")] = 0.0

    @staticmethod
    def from_traffic(traffic: Traffic) -> AnswerTraffic:
        return AnswerTraffic(
            traffic.experts_used, traffic.hits, traffic.bytes_moved, traffic.bytes_without_cache,
            traffic.vanilla_bytes, traffic.stall_seconds,
        )  # fmt: skip

    def __add__(self, other: AnswerTraffic) -> AnswerTraffic:
        pairs = zip(astuple(self), astuple(other), strict=True)
        totals: list[Any] = [None if None in pair else sum(pair) for pair in pairs]
        return AnswerTraffic(*totals)

    @property
    def hit_rate(self) -> float:
        return self.hits / self.used if self.used else 1.0

    @property
    def saved_vs_vanilla(self) -> float | None:
        """Fraction of vanilla's bytes on the same forwards that were not moved."""
        return 1 - self.bytes_moved / self.bytes_vanilla if self.bytes_vanilla else None


@dataclass(frozen=True)
class Answer:
    """One variant's answer to one item; experts and bytes are per layer and forward.

    ``seconds`` is the generation time since the variant's previous answer, so the sum is the
    variant's total. ``error`` says that the logits were not finite; then ``correct`` is false and
    all counts are 0. ``from_disk`` marks an answer that was read from the log.
    """

    variant: Annotated[str, Key("arm")]
    task: Annotated[str, Key("task")]
    id: Annotated[str, Key("id")]
    correct: Annotated[bool, Key("correct")]
    extracted: Annotated[str | None, Key("extracted")]
    other_metrics: Annotated[Mapping[str, bool], Key("also")]
    output: Annotated[str, Key("output")] = ""
    finish_reason: Annotated[str, Key("finish")] = "error"  # or "stop", "length"
    new_tokens: Annotated[int, Key("new_tokens")] = 0
    forwards: Annotated[int, Key("forwards")] = 0  # denoising forwards
    blocks: Annotated[int, Key("blocks")] = 0
    prefills: Annotated[int, Key("prefills")] = 0
    commits: Annotated[int, Key("commits")] = 0
    experts: Annotated[float, Key("experts")] = 0.0  # mean unique experts
    expert_forwards: Annotated[int, Key("expert_forwards")] = 0  # forwards in the means
    expert_bytes: Annotated[float, Key("expert_bytes")] = 0.0
    vote_mass_kept: Annotated[float, Key("vote_mass_kept")] = 0.0
    seconds: Annotated[float, Key("seconds")] = 0.0
    error: Annotated[str | None, Key("error")] = None
    traffic: Annotated[AnswerTraffic | None, Key("served")] = None  # None: experts are in memory
    from_disk: bool = field(default=False, compare=False)

    @property
    def key(self) -> AnswerKey:
        return self.variant, self.task, self.id

    @property
    def is_final(self) -> bool:
        """False for an error of an earlier version that says nothing about the item."""
        return self.error is None or bool(ITEM_ERROR.search(self.error))


EXAMPLE: Mapping[str, object] = to_json(Answer("", "", "", False, None, {}))


@dataclass(frozen=True)
class AnswerLog:
    """The answers of one run, in memory and, with a file, on disk. Answers are appended."""

    file: LockedFile | None
    answers: dict[AnswerKey, Answer]

    @staticmethod
    @contextmanager
    def open(
        folder: Path | None,
        run_config: Mapping[str, object],
        on_remark: Callable[[str], None] = lambda _: None,
    ) -> Iterator[AnswerLog]:
        """The log of a folder, which is locked for other processes, or one in memory.

        Raises TaskError if the folder holds another run, and ConfigError if it is in use.
        """
        if folder is None:
            yield AnswerLog(None, {})
            return
        folder.mkdir(parents=True, exist_ok=True)
        with LockedFile(folder / ANSWERS_FILE) as file:
            content = file.read()
            _check_same_run(folder, run_config, is_new=not content.strip(b"\0\n"))
            yield AnswerLog(file, _read_answers(file, content, on_remark))

    def add(self, answers: Sequence[Answer]) -> None:
        """Appends answers; they are on disk when this returns.

        If a write fails, it raises and the file ends with the previous line.
        """
        for answer in answers:
            if answer.key in self.answers:
                raise RuntimeError(f"answered twice: {answer.key}")
            try:
                if self.file is not None:
                    # ASCII, since an output may hold any character, line separators included.
                    line = json.dumps(to_json(answer), allow_nan=False) + "\n"
                    self.file.append(line.encode("ascii"), sync=answer is answers[-1])
            except ConfigError as error:
                raise TaskError(
                    f"{error}; {len(self.answers)} answers are stored, and the same command "
                    "continues from them"
                ) from None
            self.answers[answer.key] = answer


def _read_answers(
    file: LockedFile, content: bytes, on_remark: Callable[[str], None]
) -> dict[AnswerKey, Answer]:
    """Reads all lines. A damaged last line, of a kill or a power cut, is removed.

    An answer that is not final is left out: its item is asked again, and a later line holds it.
    """
    answers: dict[AnswerKey, Answer] = {}
    lines = content.split(b"\n")
    damaged = lines.pop()
    if lines and _decode_answer(lines[-1]) is None:
        damaged = lines.pop() + b"\n" + damaged
    for number, line in enumerate(lines, start=1):
        answer = _decode_answer(line)
        if answer is None:
            raise TaskError(
                f"{file.path}: line {number} is not an answer of a run; delete it, and the "
                "same command asks its item again"
            )
        if answer.key in answers:
            raise TaskError(f"{file.path}: line {number} repeats {' '.join(answer.key)}")
        if answer.is_final:
            answers[answer.key] = answer
    if damaged:
        file.truncate(len(content) - len(damaged))
        on_remark(f"{file.path}: the damaged last line, {len(lines) + 1}, is dropped")
    return answers


def answer_from_dict(values: Mapping[str, Any]) -> Answer:
    """An answer from its JSON values, with the policy in current spelling.

    Raises TypeError for missing or unknown keys, and for values of other types.
    """
    values = {"served": None, **values}
    if set(values) != set(names_of(Answer)) or not all(map(_has_type, values, values.values())):
        raise TypeError("not the values of an answer")
    values["arm"] = update_policy_text(values["arm"])
    if values["served"] is not None:
        values["served"] = from_json(AnswerTraffic, values["served"])
    return from_json(Answer, values)


def _has_type(key: str, value: object) -> bool:
    """Whether the value has the type of its field; numbers are finite."""
    if key == "served" and isinstance(value, dict):
        return all(map(_is_number, (value | {"vanilla": value.get("vanilla") or 0}).values()))
    kind = type(EXAMPLE.get(key))
    if kind in (int, float):
        return _is_number(value)
    return isinstance(value, str | None if kind is type(None) and key != "served" else kind)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _decode_answer(line: bytes) -> Answer | None:
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        return replace(answer_from_dict(json.loads(line)), from_disk=True)
    return None


def _check_same_run(folder: Path, run_config: Mapping[str, object], *, is_new: bool) -> None:
    """Writes the run's identity to a new folder; raises if the folder holds another run."""
    path, expected = folder / RUN_FILE, json.dumps(run_config, indent=1, allow_nan=False) + "\n"
    if is_new:
        atomic_write(path, expected.encode())
        return
    values = dict(_differences(_read_run(path), json.loads(expected)))
    options = [text for names, text in values.items() if names[-1] not in CONSEQUENCES]
    if differences := options or list(values.values()):
        shown, more = differences[:MAX_DIFFERENCES_SHOWN], len(differences) - MAX_DIFFERENCES_SHOWN
        shown += [f"and {more} more"] if more > 0 else []
        raise TaskError(
            f"{folder}: holds another run: {'; '.join(shown)}; give its options or a new folder"
        )


def _read_run(path: Path) -> Mapping[str, object]:
    try:
        return read_object(path)
    except CheckpointError as error:
        raise TaskError(
            f"{error}; it must identify the run of {ANSWERS_FILE}: restore it, or use a new folder"
        ) from None


def _differences(
    stored: object, expected: object, *names: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The path of each value that differs, and the difference in words."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        for key in {**stored, **expected}:
            yield from _differences(stored.get(key), expected.get(key), *names, str(key))
    elif stored != expected:
        values = f"{_shorten(stored)} in the folder and {_shorten(expected)} in this run"
        predicate = "differs" if names[-1] in DIGESTS else f"is {values}"
        yield names, f"{_value_name(*names)} {predicate}"


def _value_name(section: str, *names: str) -> str:
    """A value of ``run.json`` for messages; the fields of options stand in backticks."""
    if section == "tasks" and len(names) == 1:
        return f"task {names[0]}"
    name = names[-1] if names else section
    fields = {key.name: name for name, key in keys_of(GenerationConfig).items()} | FIELDS
    label = DIGESTS.get(name, f"`{fields.get(name, name)}`")
    return f"{label} of task {names[0]}" if section == "tasks" and names else label


def _shorten(value: object) -> str:
    if value is None or isinstance(value, dict):
        return "not set" if value is None else "set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
