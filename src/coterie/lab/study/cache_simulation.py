"""Answers and the experts of each of their forwards, and simulated caches that serve them.

The experts of every forward determine the loads of a cache of any size, and the state of a cache
in which an interrupted run continues.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.engine.engine import Engine
from coterie.errors import TaskError
from coterie.keys import to_json
from coterie.lab.evals.answer_log import Answer, answer_from_dict
from coterie.lab.evals.generation import EvalRequest, GenerationOutcome, generate_outcomes
from coterie.lab.evals.results import EvalResult, Variant
from coterie.lab.evals.run import MAX_GRADERS, make_answer
from coterie.lab.evals.task import Grade, Task
from coterie.lab.study.context import BATCH_SIZE
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.offload.eviction import Mask
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.routing import update_policy_text
from coterie.telemetry import Recorder, RowId
from coterie.values import ExpertRequest, ExpertStore, Routing, Scores, expert_mask

Key = tuple[str, str]  # task, id
IntArray = NDArray[np.int64]
ProgressCallback = Callable[[float], None]


@dataclass(frozen=True)
class AnswerEntry:
    """One answer, with the first letter of the kind of each forward and the experts in use."""

    answer: Answer
    kinds: str
    used: Mask  # [F, L, E]

    @property
    def key(self) -> Key:
        return self.answer.task, self.answer.id


@dataclass  # mutable: it collects
class ExpertUseRecorder(Recorder):
    """Records the experts of every forward of every row; ``kind`` returns a row's forward kind."""

    kind: Callable[[int], str]
    shape: tuple[int, int]  # MoE layers, experts
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
        """Remove a row and return its forward kinds and experts in use [F, L, E].

        Incomplete forwards are omitted; ``row`` is None for an answer that was not generated.
        """
        layers, experts = self.shape
        forwards = [] if row is None else self._forwards.pop(row, [])
        complete = [forward for forward in forwards if len(forward[1]) == layers]
        if not complete:
            return "", np.zeros((0, layers, experts), dtype=bool)
        used = torch.stack([torch.stack(masks) for _, masks in complete])
        return "".join(kind[0] for kind, _ in complete), used.cpu().numpy()


class AnswerTraceLog:
    """The entries of one run on disk, one line per answer, in the order of writing."""

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        """``shape``: MoE layers, experts. Raises TaskError where another process has it open."""
        self.entries: dict[Key, AnswerEntry] = {}
        self._path, self._shape = path, shape
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self.close()
            raise TaskError(f"{path}: another process writes this file") from None
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
        """Append the entries; they are on disk when this returns."""
        for entry in entries:
            os.write(self._file, _encode_entry(entry))
            self.entries[entry.key] = entry
        os.fsync(self._file)

    def _read(self) -> None:
        """Read every complete line and truncate an incomplete one of a killed process."""
        content = self._path.read_bytes()
        end = content.rfind(b"\n") + 1
        os.ftruncate(self._file, end)
        for line in content[:end].splitlines():
            entry = _decode_entry(line, self._shape)
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


@dataclass(frozen=True)
class ReplayRequest:
    """One run: a variant, the number of problems, and the slots of each layer's cache.

    ``slots`` is None for a policy that does not depend on the resident experts.
    """

    arm: Variant
    items: int
    slots: int | None = None

    @property
    def file(self) -> str:
        """Name of its log file."""
        slots = "" if self.slots is None else f" slots={self.slots}"
        return f"{self.arm.name}{slots}".replace("/", "+") + ".jsonl"


@dataclass(frozen=True)
class CacheTransfers:
    """Experts used and loaded [F, L] in one cache, the answer of each forward [F], and its kind."""

    used: IntArray
    loads: IntArray
    answer_ids: IntArray
    is_decode: NDArray[np.bool_]

    def sum_by_answer(self, counts: IntArray, answers: int) -> IntArray:
        """[answers]: the sums over layers and forwards."""
        sums = np.zeros(answers, dtype=np.int64)
        np.add.at(sums, self.answer_ids, counts.sum(-1))
        return sums


def simulate_cache(entries: Sequence[AnswerEntry], capacity: int) -> CacheTransfers:
    """Serve the answers in sequence with an LRU cache of ``capacity`` slots per layer.

    The cache is empty before the first answer and persists between answers.
    """
    used = np.concatenate([entry.used for entry in entries])
    cache = CacheSimulator(used.shape[-1], capacity)
    loads = [
        [cache.count_loads(layer, mask) for layer, mask in enumerate(forward)] for forward in used
    ]
    lengths = [len(entry.kinds) for entry in entries]
    return CacheTransfers(
        used=used.sum(-1),
        loads=np.array(loads, dtype=np.int64).reshape(used.shape[:2]),
        answer_ids=np.repeat(np.arange(len(entries)), lengths),
        is_decode=np.array([kind == "d" for entry in entries for kind in entry.kinds]),
    )


def interleave_questions(tasks: Sequence[Task], items: int, engine: Engine) -> list[EvalRequest]:
    """The first ``items`` problems, alternating between tasks; fewer are a prefix of more."""
    by_task = [
        [EvalRequest(task, item, generation) for item in task.items()]
        for task in tasks
        for generation in [engine.generation.replace(**task.generation())]
    ]
    interleaved = chain.from_iterable(zip_longest(*by_task))
    return [question for question in interleaved if question is not None][:items]


def answer_questions(
    engine: Engine,
    tasks: Sequence[Task],
    request: ReplayRequest,
    folder: Path,
    on_progress: ProgressCallback,
) -> list[AnswerEntry]:
    """The entry of every problem, in order; entries in the log file are not generated again.

    A policy that depends on the resident experts answers one problem at a time.
    """
    model, all_questions = engine.model, interleave_questions(tasks, request.items, engine)
    shape = len(model.spec.moe_layers), model.spec.router.experts
    with AnswerTraceLog(_place(folder, request.file), shape) as log:
        remaining = [
            q.replace(request.arm.generation)
            for q in all_questions
            if _question_key(q) not in log.entries
        ]
        generate = _answer_sequentially if request.slots is not None else _answer_batched
        for new_entries in generate(engine, request, remaining, log) if remaining else ():
            log.add(new_entries)
            on_progress(len(log.entries) / len(all_questions))
        ordered_entries = [log.entries[_question_key(question)] for question in all_questions]
    if all(entry.answer.error for entry in ordered_entries):
        raise TaskError(f"{request.arm.name}: every item failed: {ordered_entries[0].answer.error}")
    return ordered_entries


def _place(folder: Path, name: str) -> Path:
    """The log file of this name, or an existing one with an old spelling of the policy."""
    others = (
        path for path in sorted(folder.glob("*.jsonl")) if update_policy_text(path.name) == name
    )
    return next(others, folder / name)


def to_eval_result(request: ReplayRequest, entries: Sequence[AnswerEntry]) -> EvalResult:
    """The answers, grouped by task."""
    tasks = dict.fromkeys(entry.answer.task for entry in entries)
    ordered = [entry.answer for task in tasks for entry in entries if entry.answer.task == task]
    return EvalResult(request.arm, tuple(ordered))


def with_store(model: Model, store: Callable[[ExpertStore], ExpertStore]) -> Model:
    """The same model with another expert store."""
    networks = [layer.feed_forward for layer in model.transformer.layers]
    original_stores = {id(block.store): block.store for block in networks if isinstance(block, MoE)}
    new_stores = {name: store(block) for name, block in original_stores.items()}
    layers = tuple(
        replace(layer, feed_forward=replace(block, store=new_stores[id(block.store)]))
        if isinstance(block := layer.feed_forward, MoE)
        else layer
        for layer in model.transformer.layers
    )
    return replace(model, transformer=replace(model.transformer, layers=layers))


def _answer_batched(
    engine: Engine, request: ReplayRequest, remaining: Sequence[EvalRequest], log: AnswerTraceLog
) -> Iterator[list[AnswerEntry]]:
    """In batches: the answers are independent."""
    del log
    yield from _generate_entries(engine.model, engine, request, remaining, rows=BATCH_SIZE)


def _answer_sequentially(
    engine: Engine, request: ReplayRequest, remaining: Sequence[EvalRequest], log: AnswerTraceLog
) -> Iterator[list[AnswerEntry]]:
    """One at a time. After a failure the cache state is unknown and is rebuilt from the log."""
    pending = list(remaining)
    while pending:
        model = _with_cache_state(engine.model, request, log)
        for entries in _generate_entries(model, engine, request, pending, rows=1):
            yield entries
            pending = pending[len(entries) :]
            if any(entry.answer.error for entry in entries):
                break


def _with_cache_state(model: Model, request: ReplayRequest, log: AnswerTraceLog) -> Model:
    """The model with a simulated cache that has served all entries of the log."""
    slots, layers = request.slots or 1, model.spec.moe_layers

    def make_store(base: ExpertStore) -> ExpertStore:
        cached_store = SimulatedCacheStore(
            base, model.spec.router.experts, slots, device=model.transformer.device
        )
        for entry in log.entries.values():
            for forward in entry.used:
                for layer, used in zip(layers, forward, strict=True):
                    for _ in cached_store.serve(layer, ExpertRequest(torch.from_numpy(used))):
                        pass
        return cached_store

    return with_store(model, make_store)


def _generate_entries(
    model: Model,
    engine: Engine,
    request: ReplayRequest,
    remaining: Sequence[EvalRequest],
    *,
    rows: int,
) -> Iterator[list[AnswerEntry]]:
    """Generate and grade, batch by batch."""

    def kind(row: int) -> str:
        next_pass = recording_engine.sequence(row).next_pass
        return "" if next_pass is None else next_pass.kind

    spec, policy = model.spec, request.arm.policy
    recorder = ExpertUseRecorder(kind, (len(spec.moe_layers), spec.router.experts))
    recording_engine = Engine(
        model, generation=engine.generation, recorder=recorder, record_all=True
    )
    with ThreadPoolExecutor(MAX_GRADERS) as graders:
        for outcomes_batch in generate_outcomes(
            recording_engine, remaining, policy, batch_size=rows
        ):
            grades = graders.map(_grade, outcomes_batch)
            yield [
                AnswerEntry(
                    make_answer(request.arm.name, outcome, grade), *recorder.pop(outcome.row)
                )
                for outcome, grade in zip(outcomes_batch, grades, strict=True)
            ]


def _grade(outcome: GenerationOutcome) -> Grade:
    if outcome.result is None:
        return Grade(correct=False, extracted=None)
    return outcome.request.task.grade(outcome.result.text, outcome.request.item)


def _question_key(question: EvalRequest) -> tuple[str, str]:
    return question.task.name, question.item.id
