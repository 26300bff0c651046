"""One evaluation: every item under every arm, paired, kept answer by answer.

``run`` works through chunks of items and lets the arms take turns on each, so that whatever is
there after an interrupt is paired. A folder that holds a part of the same run is gone on with.

Where not all experts are in memory, an answer may depend on what is there, and so on what was asked
before. There questions are asked one by one, and the memory is emptied before every ``lasts`` of
them: nothing that was asked before such a stretch, by whichever arm, is felt in it. A run that
stopped inside one answers it again from its start, and holds the answers against those it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coterie.checkpoints.fingerprint import fingerprint
from coterie.checkpoints.source import find_folder
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CoterieError
from coterie.lab.evals.answer_log import Answer, AnswerKey, AnswerLog
from coterie.lab.evals.generation import EvalRequest, GenerationOutcome, generate_outcomes
from coterie.lab.evals.results import EvalResult, Variant
from coterie.lab.evals.task import Grade, Item, Task
from coterie.lab.evals.traffic import AnswerTraffic

__all__ = ["Answer", "AnswerCallback", "EvalResult", "Variant", "run_eval"]

CHUNK_FACTOR = 4  # times ``rows``: items that one arm answers before the next has its turn
MAX_GRADERS = 8
NO_OPTIONS: Mapping[str, object] = {}

AnswerCallback = Callable[[Answer], None]
PendingGrade = tuple[GenerationOutcome, Future[Grade]]


def run_eval(
    engine: Engine,
    tasks: Sequence[Task],
    variants: Sequence[Variant],
    folder: Path | None,
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    batch_size: int = 16,
    reset_every: int = 1,
    on_answer: AnswerCallback = lambda _: None,
    options: Mapping[str, object] = NO_OPTIONS,
) -> list[EvalResult]:
    """Answers every item of every task under every arm; one sheet an arm, in their order.

    ``limit`` items of each task: its first ones, or the first after a shuffle by ``shuffle_seed``.
    Generation: the engine's, then the task's usual, then ``asked``, then the arm's own. ``told``
    hears of every answer, first of those found in ``folder``. An item that fails (NaN logits, a
    prompt that does not fit) is an answer with an ``error``, and the run goes on. Raises
    CoterieError for an arm that this model cannot run, before anything is written, and for a folder
    that holds another run. Arms may be added to a folder later; what it holds of others stays.
    ``rows`` is 1, and ``lasts`` is heard, where the model's memory for experts is short or imagined
    to be.
    """
    by_name = {variant.name: variant for variant in variants}
    requests = _make_requests(engine, tasks, limit, shuffle_seed, options)
    _check_run(engine, tasks, requests, by_name.values(), folder, batch_size=batch_size)
    run_config = run_identity(
        engine,
        tasks,
        limit=limit,
        shuffle_seed=shuffle_seed,
        reset_every=reset_every,
        options=options,
    )
    scheduler = _Scheduler(engine, batch_size, reset_every)
    with AnswerLog(folder, run_config) as log, _grader_pool() as graders:
        for name in by_name:
            for request in requests:
                if (stored := log.answers.get(_answer_key(name, request))) is not None:
                    on_answer(stored)
        for chunk in scheduler.chunks(requests):
            for variant in by_name.values():
                for answers in scheduler.answers(variant, chunk, log.answers, graders):
                    log.add(answers)
                    for answer in answers:
                        on_answer(answer)
        return [
            EvalResult(
                variant, tuple(log.answers[_answer_key(name, request)] for request in requests)
            )
            for name, variant in by_name.items()
        ]


def run_identity(
    engine: Engine,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    reset_every: int = 1,
    options: Mapping[str, object] = NO_OPTIONS,
) -> dict[str, object]:
    """What makes two runs the same run, as JSON values; arms and ``rows`` do not."""
    model, memory = engine.model, None
    if model.store.traffic_log is not None and (plan := model.placement.plan) is not None:
        memory = {**plan.config.to_dict(), "slots": plan.slots, "lasts": reset_every}
        if (fallback := plan.config.fallback_model) is not None:
            memory["coarse"] = fingerprint(find_folder(fallback.folder))
    return {
        "model": None if model.folder is None else fingerprint(model.folder),
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "experts": None
        if (expert_format := model.spec.expert_format) is None
        else str(expert_format),
        "device": model.transformer.device.type,
        "memory": memory,
        "limit": limit,
        "shuffle_seed": shuffle_seed,
        "tasks": {
            task.name: {
                "settings": dict(task.settings()),
                "generation": _default_generation(engine, task, options).document(),
                "items": len(items := _select_items(task, limit, shuffle_seed)),
                "questions": _hash_items(task, items),
            }
            for task in tasks
        },
    }


def _make_requests(
    engine: Engine,
    tasks: Sequence[Task],
    limit: int | None,
    shuffle_seed: int | None,
    options: Mapping[str, object],
) -> list[EvalRequest]:
    return [
        EvalRequest(task, item, generation)
        for task in tasks
        for generation in [_default_generation(engine, task, options)]
        for item in _select_items(task, limit, shuffle_seed)
    ]


def _select_items(task: Task, limit: int | None, shuffle_seed: int | None) -> list[Item]:
    """The items of a run, in its order; a task's do not depend on the other tasks."""
    items = list(task.items())
    if shuffle_seed is not None:
        random.Random(f"{task.name}/{shuffle_seed}").shuffle(items)
    return items[:limit]


@dataclass(frozen=True)
class _Scheduler:
    """How arms take turns: what is asked together, and what is in memory when it is."""

    engine: Engine
    batch_size: int
    reset_every: int

    def chunks(self, requests: Sequence[EvalRequest]) -> Iterator[Sequence[EvalRequest]]:
        """What one arm answers before the next has its turn; stretches of memory are whole."""
        size = CHUNK_FACTOR * self.batch_size
        if self.engine.model.store.traffic_log is not None:
            size = self.reset_every * -(-CHUNK_FACTOR // self.reset_every)
        return (requests[start : start + size] for start in range(0, len(requests), size))

    def answers(
        self,
        variant: Variant,
        chunk: Sequence[EvalRequest],
        stored: Mapping[AnswerKey, Answer],
        graders: ThreadPoolExecutor,
    ) -> Iterator[list[Answer]]:
        """An arm's to what nobody knows yet, as they come."""
        if self.engine.model.store.traffic_log is None:
            missing = [
                request for request in chunk if _answer_key(variant.name, request) not in stored
            ]
            yield from _generate_answers(self.engine, variant, missing, self.batch_size, graders)
            return
        for start in range(0, len(chunk), self.reset_every):
            segment = chunk[start : start + self.reset_every]
            missing_indices = [
                n
                for n, request in enumerate(segment)
                if _answer_key(variant.name, request) not in stored
            ]
            if not missing_indices:
                continue
            self.engine.reset_cache()
            for answers in _generate_answers(
                self.engine, variant, segment[: missing_indices[-1] + 1], 1, graders
            ):
                yield [
                    answer
                    for answer in answers
                    if not _check_unchanged(answer, stored.get(answer.key))
                ]


def _check_unchanged(answer: Answer, stored: Answer | None) -> bool:
    """Raises where a question was answered otherwise before."""
    if stored is not None and stored.output != answer.output:
        raise CoterieError(
            f"{answer.variant}: {answer.id} was answered otherwise before, so what it leaves in memory "
            "for the next is not known; name another folder"
        )
    return stored is not None


def _generate_answers(
    engine: Engine,
    variant: Variant,
    requests: Sequence[EvalRequest],
    batch_size: int,
    graders: ThreadPoolExecutor,
) -> Iterator[list[Answer]]:
    """As they come."""
    name, in_background = variant.name, _grades_in_background(engine)
    pending: list[PendingGrade] = []
    variant_requests = [request.replace(variant.generation) for request in requests]
    for finished in generate_outcomes(
        engine, variant_requests, variant.policy, batch_size=batch_size
    ):
        pending += [(outcome, graders.submit(_grade, outcome)) for outcome in finished]
        complete, pending = _split_graded(pending, wait_for_all=not in_background)
        yield [make_answer(name, outcome, future.result()) for outcome, future in complete]
    complete, _ = _split_graded(pending, wait_for_all=True)
    yield [make_answer(name, outcome, future.result()) for outcome, future in complete]


def _grades_in_background(engine: Engine) -> bool:
    """Whether grading runs beside generation, as on a GPU; on a CPU it would be in its way."""
    return engine.model.transformer.device.type != "cpu"


def _split_graded(
    pending: list[PendingGrade], *, wait_for_all: bool
) -> tuple[list[PendingGrade], list[PendingGrade]]:
    """Those that are graded, and those that are not."""
    if wait_for_all:
        wait([future for _, future in pending])
    complete, waiting = [], []
    for entry in pending:
        (complete if entry[1].done() else waiting).append(entry)
    return complete, waiting


def _grade(outcome: GenerationOutcome) -> Grade:
    if outcome.result is None:
        return Grade(correct=False, extracted=None)
    return outcome.request.task.grade(outcome.result.text, outcome.request.item)


def make_answer(variant: str, outcome: GenerationOutcome, grade: Grade) -> Answer:
    """As it is kept."""
    result, request = outcome.result, outcome.request
    return Answer(
        variant=variant,
        task=request.task.name,
        id=request.item.id,
        correct=grade.correct,
        extracted=grade.extracted,
        other_metrics=dict(grade.other_metrics),
        output="" if result is None else result.text,
        finish_reason="error" if result is None else result.finish_reason,
        new_tokens=0 if result is None else result.new_tokens,
        forwards=0 if result is None else result.forwards,
        blocks=0 if result is None else result.blocks,
        prefills=0 if result is None else result.prefills,
        commits=0 if result is None else result.commits,
        experts=0.0 if result is None else result.experts.mean,
        expert_forwards=0 if result is None else result.experts.forwards,
        expert_bytes=0.0 if result is None else result.expert_bytes,
        vote_mass_kept=0.0 if result is None else result.vote_mass_kept,
        seconds=outcome.seconds,
        error=outcome.error,
        traffic=None if result is None else AnswerTraffic.from_traffic(result.traffic),
    )


def _answer_key(variant: str, request: EvalRequest) -> tuple[str, str, str]:
    return variant, request.task.name, request.item.id


def _default_generation(
    engine: Engine, task: Task, options: Mapping[str, object]
) -> GenerationConfig:
    return engine.generation.replace(**task.generation()).replace(**options)


def _check_run(
    engine: Engine,
    tasks: Sequence[Task],
    requests: Sequence[EvalRequest],
    variants: Collection[Variant],
    folder: Path | None,
    *,
    batch_size: int,
) -> None:
    """Raises for what would fail at every item, or could not be gone on with."""
    if not tasks or not variants:
        raise CoterieError("an evaluation needs at least one task and one arm")
    if batch_size != 1 and engine.model.store.traffic_log is not None:
        raise CoterieError(
            f"{batch_size} rows together: where not all experts are in memory, an answer may depend on "
            "who is beside it; ask one by one"
        )
    task_names = {request.task.name for request in requests}
    if empty := [task.name for task in tasks if task.name not in task_names]:
        raise CoterieError(f"task {empty[0]} has no items")
    if folder is not None and engine.model.folder is None:
        raise CoterieError(f"{engine.model.name}: made in memory, so no folder can know it again")
    item_keys: set[tuple[str, str]] = set()
    for request in requests:
        task, item = request.task.name, request.item.id
        if (task, item) in item_keys:
            raise CoterieError(f"task {task}: two items have the id {item!r}")
        item_keys.add((task, item))
    token_id = next(id for id in range(2) if id != engine.model.mask_id)
    for generation in {request.generation for request in requests}:
        for variant in variants:
            options = generation.replace(**variant.generation).document()
            engine.cancel(engine.submit([token_id], policy=variant.policy, **options))


def _hash_items(task: Task, items: Iterable[Item]) -> str:
    """Of prompts and golds: a changed file of questions is another run."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, task.prompt(item), item.gold]).encode() + b"\n")
    return digest.hexdigest()[:16]


@contextmanager
def _grader_pool() -> Iterator[ThreadPoolExecutor]:
    """Threads, for what grading waits for are mostly children; an interrupt does not wait."""
    pool = ThreadPoolExecutor(min(MAX_GRADERS, os.cpu_count() or 1), thread_name_prefix="grader")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
