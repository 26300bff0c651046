"""Answers given behind an imagined memory, and what memories of any size would have moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.lab.evals.generation import EvalRequest, GenerationOutcome, generate_outcomes
from coterie.lab.evals.results import EvalResult, Variant
from coterie.lab.evals.run import MAX_GRADERS, make_answer
from coterie.lab.evals.task import Grade, Task
from coterie.lab.study.context import BATCH_SIZE
from coterie.lab.study.logbook import AnswerEntry, AnswerTraceLog, ExpertUseRecorder
from coterie.loading.load import Model
from coterie.model.moe import MoE
from coterie.offload.simulated_store import CacheSimulator, SimulatedCacheStore
from coterie.routing import update_policy_text
from coterie.values import ExpertRequest, ExpertStore

IntArray = NDArray[np.int64]
ProgressCallback = Callable[[float], None]


@dataclass(frozen=True)
class ReplayRequest:
    """One run: an arm, the first so many questions, and the slots of each layer that the policy is
    told of; None for one that does not ask who is in memory."""

    arm: Variant
    items: int
    slots: int | None = None

    @property
    def file(self) -> str:
        """Of its logbook."""
        slots = "" if self.slots is None else f" slots={self.slots}"
        return f"{self.arm.name}{slots}".replace("/", "+") + ".jsonl"


@dataclass(frozen=True)
class CacheTransfers:
    """What one memory served: experts used and brought, [F, L], and which answer [F] a forward was
    for; which of them decoded."""

    used: IntArray
    loads: IntArray
    answer_ids: IntArray
    is_decode: NDArray[np.bool_]

    def sum_by_answer(self, counts: IntArray, answers: int) -> IntArray:
        """[answers]: the sum over layers and forwards."""
        sums = np.zeros(answers, dtype=np.int64)
        np.add.at(sums, self.answer_ids, counts.sum(-1))
        return sums


def simulate_cache(entries: Sequence[AnswerEntry], capacity: int) -> CacheTransfers:
    """Of answers given one after the other, in a memory that is empty before the first and lives on
    from each to the next; LRU."""
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
    """The first ``items``, the tasks taking turns, so that fewer are the beginning of more."""
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
    """Every question's entry, in their order; those that the folder's logbook holds stand.

    A policy that is told who is in memory answers one question at a time, as ``moves`` counts.
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
        raise CoterieError(
            f"{request.arm.name}: no item got an answer: {ordered_entries[0].answer.error}"
        )
    return ordered_entries


def _place(folder: Path, name: str) -> Path:
    """The logbook of this name, or the one whose name spells the same policy as before."""
    others = (
        path for path in sorted(folder.glob("*.jsonl")) if update_policy_text(path.name) == name
    )
    return next(others, folder / name)


def to_eval_result(request: ReplayRequest, entries: Sequence[AnswerEntry]) -> EvalResult:
    """The answers task by task, as sheets have them."""
    tasks = dict.fromkeys(entry.answer.task for entry in entries)
    ordered = [entry.answer for task in tasks for entry in entries if entry.answer.task == task]
    return EvalResult(request.arm, tuple(ordered))


def with_store(model: Model, store: Callable[[ExpertStore], ExpertStore]) -> Model:
    """The same model, its experts behind another store."""
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
    """Many rows at once: nobody's answer depends on another's."""
    del log
    yield from _generate_entries(engine.model, engine, request, remaining, rows=BATCH_SIZE)


def _answer_sequentially(
    engine: Engine, request: ReplayRequest, remaining: Sequence[EvalRequest], log: AnswerTraceLog
) -> Iterator[list[AnswerEntry]]:
    """One after the other; after one that failed the memory is made again from the logbook, for
    nobody knows what was in it then."""
    pending = list(remaining)
    while pending:
        model = _with_cache_state(engine.model, request, log)
        for entries in _generate_entries(model, engine, request, pending, rows=1):
            yield entries
            pending = pending[len(entries) :]
            if any(entry.answer.error for entry in entries):
                break


def _with_cache_state(model: Model, request: ReplayRequest, log: AnswerTraceLog) -> Model:
    """The model behind a memory that has served all that the logbook holds."""
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
    """As they come, graded."""

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
