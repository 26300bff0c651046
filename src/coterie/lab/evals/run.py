"""Evaluations: every item under every variant, paired, with each answer stored as it is graded.

Chunks of items are processed in turn, and all variants answer a chunk before the next, so that the
answers of an interrupted run are paired. A run continues from the answers in its folder.

With a cache of experts an answer may depend on the cache's content, and so on earlier items. Then
items are generated one by one, and the cache is emptied before every ``reset_every`` of them. No
answer depends on items before its segment or on other variants. A run that stopped within a segment
repeats it from its start and compares the repeated answers with the stored ones.

An error is not an answer, except non-finite logits. Any other error ends the run, and a repeated
call continues from the stored answers. The files of the model must stay as they were loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from coterie.checkpoints.fingerprint import fingerprint
from coterie.checkpoints.source import find_folder
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CheckpointError, CoterieError, TaskError
from coterie.lab.evals.answer_log import Answer, AnswerKey, AnswerLog, AnswerTraffic
from coterie.lab.evals.choice_scores import choose
from coterie.lab.evals.generation import (
    EvalRequest,
    GenerationOutcome,
    generate_outcomes,
    read_prompt,
)
from coterie.lab.evals.results import EvalResult, Variant
from coterie.lab.evals.task import Grade, Item, Task
from coterie.loading.load import Model
from coterie.model.checkpoint import Checkpoint

__all__ = ["Answer", "AnswerCallback", "EvalResult", "Variant", "run_eval"]

CHUNK_FACTOR = 4  # items of a chunk, in batches
MAX_GRADERS = 8
NO_OPTIONS: Mapping[str, object] = {}
RESULT_FIELDS = (
    *("finish_reason", "new_tokens", "forwards", "blocks", "prefills", "commits"),
    *("expert_bytes", "vote_mass_kept"),
)  # fields that an answer takes from its result

AnswerCallback = Callable[[Answer], None]
RemarkCallback = Callable[[str], None]


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
    on_remark: RemarkCallback = lambda _: None,
    options: Mapping[str, object] = NO_OPTIONS,
    all_variants: bool = False,
) -> list[EvalResult]:
    """Answers every item of every task under every variant; one result per variant, in order.

    ``limit`` selects each task's first items, after a shuffle if ``shuffle_seed`` is set.
    Generation options are the engine's, overridden by the task's, then by ``options``, then by the
    variant's. ``on_answer`` receives every answer; those read from ``folder`` come first. An item
    with non-finite logits becomes an answer with an ``error``. Variants may be added to a folder
    later; ``all_variants`` adds the results of earlier ones. With a cache of experts
    ``batch_size`` must be 1.

    Raises TaskError if the folder holds another run, and an error for a variant or a prompt that
    this model cannot run, before anything is written.
    """
    by_name = {variant.name: variant for variant in variants}
    requests = [
        EvalRequest(task, item, _default_generation(engine, task, options))
        for task in tasks
        for item in _select_items(task, limit, shuffle_seed)
    ]
    if not tasks or not variants:
        raise TaskError("an evaluation needs at least one task and one variant")
    _check_run(engine, tasks, requests, folder, batch_size=batch_size)
    for remark in _check_lengths(engine, requests, by_name.values(), options):
        on_remark(remark)
    settings: dict[str, Any] = {"limit": limit, "shuffle_seed": shuffle_seed}
    settings |= {"reset_every": reset_every, "options": options}
    run_config = run_identity(engine, tasks, **settings)
    with AnswerLog.open(folder, run_config, on_remark) as log, grader_pool() as graders:
        for key in (_answer_key(name, request) for name in by_name for request in requests):
            if key in log.answers:
                on_answer(log.answers[key])
        scheduler = _Scheduler(engine, batch_size, reset_every, graders)
        for answers in scheduler.run(by_name.values(), requests, log):
            for answer in answers:
                on_answer(answer)
        if all_variants:
            by_name = _with_stored(by_name, requests, log.answers, on_remark)
        return [
            EvalResult(variant, tuple(log.answers[_answer_key(name, r)] for r in requests))
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
    """The JSON values that identify a run; variants and batch size are not among them."""
    model, memory = engine.model, None
    if model.store.traffic_log is not None and (plan := model.placement.plan) is not None:
        memory = {**plan.config.to_dict(), "slots": plan.slots, "lasts": reset_every}
        if (fallback := plan.config.fallback_model) is not None:
            memory["coarse"] = fingerprint(find_folder(fallback.folder))
    expert_format, dense_format = model.spec.expert_format, model.spec.dense_format
    # Omitted by default, so that runs without this key stay valid.
    dense = {} if dense_format is None else {"dense": str(dense_format)}
    return {
        "model": None if model.folder is None else fingerprint(model.folder),
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "experts": None if expert_format is None else str(expert_format),
        **dense,
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


def make_answer(variant: str, outcome: GenerationOutcome) -> Answer:
    """The graded answer that is stored; an outcome without a result is wrong."""
    result, request, grade = outcome.result, outcome.request, Grade(False, None)
    if result is not None:
        grade = request.task.grade(result.text, request.item)
    answer = Answer(
        variant, request.task.name, request.item.id, grade.correct, grade.extracted,
        dict(grade.other_metrics), seconds=outcome.seconds, error=outcome.error,
    )  # fmt: skip
    if result is None:
        # A prompt that leaves no room has an empty answer of full length.
        return answer if outcome.error else replace(answer, finish_reason="length")
    return replace(
        answer,
        output=result.text,
        experts=result.experts.mean,
        expert_forwards=result.experts.forwards,
        traffic=None if result.traffic is None else AnswerTraffic.from_traffic(result.traffic),
        **{name: getattr(result, name) for name in RESULT_FIELDS},
    )


@dataclass(frozen=True)
class _Scheduler:
    """The order of generation: which items run together, and when the cache is emptied."""

    engine: Engine
    batch_size: int
    reset_every: int
    graders: ThreadPoolExecutor

    @property
    def _has_cache(self) -> bool:
        return self.engine.model.store.traffic_log is not None

    def run(
        self, variants: Collection[Variant], requests: Sequence[EvalRequest], log: AnswerLog
    ) -> Iterator[list[Answer]]:
        """The missing answers of each chunk, of all variants in turn, as they are stored.

        With a cache a chunk has whole segments.
        """
        files, size = _file_stamps(self.engine.model), CHUNK_FACTOR * self.batch_size
        if self._has_cache:
            size = self.reset_every * -(-CHUNK_FACTOR // self.reset_every)
        for start in range(0, len(requests), size):
            for variant in variants:
                chunk = requests[start : start + size]
                for answers in self._answers(variant, chunk, log.answers):
                    _check_files(files)
                    log.add(answers)
                    yield answers

    def _answers(
        self, variant: Variant, chunk: Sequence[EvalRequest], stored: Mapping[AnswerKey, Answer]
    ) -> Iterator[list[Answer]]:
        """A variant's answers to the items of a chunk that have none, in order of completion."""
        missing = [r for r in chunk if _answer_key(variant.name, r) not in stored]
        if not self._has_cache:
            yield from self._generate(variant, missing)
            return
        for start in range(0, len(chunk), self.reset_every):
            segment = chunk[start : start + self.reset_every]
            while segment and segment[-1] not in missing:
                segment = segment[:-1]
            if segment:
                self.engine.reset_cache()
            for answers in self._generate(variant, segment):
                yield [a for a in answers if not _check_unchanged(a, stored.get(a.key))]

    def _generate(
        self, variant: Variant, requests: Sequence[EvalRequest]
    ) -> Iterator[list[Answer]]:
        """Generates and grades; yields answers in order of completion."""
        pending: list[Future[Answer]] = []
        in_background = _grades_in_background(self.engine)
        own_requests = [request.replace(variant.generation) for request in requests]
        for request in [request for request in own_requests if request.task.samples]:
            yield [choose(self.engine, request, variant.name, variant.policy)]
        own_requests = [request for request in own_requests if not request.task.samples]
        for outcomes in generate_outcomes(
            self.engine, own_requests, variant.policy, batch_size=self.batch_size
        ):
            pending += [self.graders.submit(make_answer, variant.name, one) for one in outcomes]
            ready = [future for future in pending if future.done() or not in_background]
            yield [future.result() for future in ready]
            pending = [future for future in pending if future not in ready]
        yield [future.result() for future in pending]


def _check_unchanged(answer: Answer, stored: Answer | None) -> bool:
    """Whether an answer is stored already; raises if its output differs."""
    if stored is not None and stored.output != answer.output:
        raise TaskError(
            f"{answer.variant}: {answer.id} has another answer in the stored run, so the cache "
            "state cannot be restored; use another folder"
        )
    return stored is not None


def _grades_in_background(engine: Engine) -> bool:
    """Whether to grade during generation; on a CPU both would compete for cores."""
    return engine.model.transformer.device.type != "cpu"


def _select_items(task: Task, limit: int | None, shuffle_seed: int | None) -> list[Item]:
    """A task's items in the order of a run; independent of the other tasks."""
    items = list(task.items())
    if shuffle_seed is not None:
        random.Random(f"{task.name}/{shuffle_seed}").shuffle(items)
    return items[:limit]


def _answer_key(variant: str, request: EvalRequest) -> AnswerKey:
    return variant, request.task.name, request.item.id


def _default_generation(
    engine: Engine, task: Task, options: Mapping[str, object]
) -> GenerationConfig:
    return engine.generation.replace(**task.generation()).replace(**options)


def _check_run(
    engine: Engine,
    tasks: Sequence[Task],
    requests: Sequence[EvalRequest],
    folder: Path | None,
    *,
    batch_size: int,
) -> None:
    """Raises for a run that would fail at every item or could not be resumed."""
    if batch_size != 1 and engine.model.store.traffic_log is not None:
        raise TaskError(
            f"`batch_size` is {batch_size}; where not all experts are in memory, an answer may "
            "depend on the others of its batch, so `batch_size` must be 1"
        )
    if folder is not None and engine.model.folder is None:
        raise TaskError(f"{engine.model.name}: not from a folder, so its run cannot be resumed")
    counts = Counter((request.task.name, request.item.id) for request in requests)
    if empty := {task.name for task in tasks} - {task for task, _ in counts}:
        raise TaskError(f"task {min(empty)} has no items")
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise TaskError(f"task {repeated[0][0]}: two items have the id {repeated[0][1]!r}")


def _check_lengths(
    engine: Engine,
    requests: Sequence[EvalRequest],
    variants: Collection[Variant],
    options: Mapping[str, object],
) -> Iterator[str]:
    """Checks each prompt and variant; yields a remark for a task with answers that are cut.

    An unreadable prompt, which will fail its item, is a remark too. Raises if the model can read no
    prompt, and if none leaves room for an answer of a length that was asked for.
    """
    model = engine.model
    for task, group in groupby(requests, key=lambda request: request.task.name):
        task_requests = list(group)
        lengths, errors = _prompt_lengths(model, task_requests)
        if not lengths:
            raise TaskError(f"task {task}: no prompt can be read: {errors[0]}")
        if errors:
            yield f"task {task}: {len(errors)} prompts cannot be read: {errors[0]}"
        for variant in variants:
            generation = task_requests[0].replace(variant.generation).generation
            is_default = "max_new_tokens" not in {**options, **variant.generation}
            most = generation.fit(min(lengths), model.spec.max_length)
            if most is None or not (is_default or most == generation):
                raise TaskError(
                    f"task {task}: max_new_tokens={generation.max_new_tokens} does not fit beside "
                    f"the shortest prompt, of {min(lengths)} tokens; {model.name} has "
                    f"{model.spec.max_length} positions"
                    + (f", so `max_new_tokens` is at most {most.max_new_tokens}" if most else "")
                )
            # Validates the policy and the options.
            prompt = [next(id for id in range(2) if id != model.mask_id)]
            engine.cancel(engine.submit(prompt, policy=variant.policy, **vars(most)))
        generation = task_requests[0].generation
        fits = [generation.fit(length, model.spec.max_length) for length in lengths]
        if cut := sum(fit != generation for fit in fits):
            yield (
                f"task {task}: in {cut} of {len(fits)} items max_new_tokens is cut to what fits in "
                f"the {model.spec.max_length} positions of {model.name}"
                + (f"; {fits.count(None)} prompts leave no room at all" if None in fits else "")
            )


def _prompt_lengths(model: Model, requests: Sequence[EvalRequest]) -> tuple[list[int], list[str]]:
    """The lengths of the readable prompts, and what is wrong with the others."""
    lengths, errors = list[int](), list[str]()
    for request in requests:
        try:
            lengths.append(len(read_prompt(model, request)))
        except CoterieError as error:
            errors.append(f"{request.item.id}: {error}")
    return lengths, errors


def _with_stored(
    by_name: Mapping[str, Variant],
    requests: Sequence[EvalRequest],
    answers: Mapping[AnswerKey, Answer],
    on_remark: RemarkCallback,
) -> dict[str, Variant]:
    """The variants with those of earlier runs, in the order of the folder after the first."""
    first, *_ = by_name
    variants = {first: by_name[first]}
    for name in dict.fromkeys(name for name, _, _ in answers):
        count = sum(_answer_key(name, request) in answers for request in requests)
        if count == len(requests):
            variants[name] = by_name.get(name) or Variant.parse(name)
        else:
            on_remark(f"{name} has {count} of {len(requests)} answers and is left out")
    return variants


def _hash_items(task: Task, items: Iterable[Item]) -> str:
    """A hash of prompts and golds: a changed data file is another run."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, task.prompt(item), item.gold]).encode() + b"\n")
    return digest.hexdigest()[:16]


def _file_stamps(model: Model) -> dict[Path, Sequence[int]]:
    """The stamps of the weights of a model and of its low-precision fallback.

    Files are mapped: writing to one changes the model.
    """
    plan = model.placement.plan
    fallback = None if plan is None else plan.config.fallback_model
    folders = [model.folder, None if fallback is None else find_folder(fallback.folder)]
    paths = [file for folder in folders if folder for file in Checkpoint.of(folder).files]
    return {path: _stamp(path) for path in paths}


def _check_files(stamps: Mapping[Path, Sequence[int]]) -> None:
    """Raises CheckpointError for a changed file, and OSError for a missing one."""
    for path, stamp in stamps.items():
        if _stamp(path) != stamp:
            raise CheckpointError(
                f"{path}: the file was changed after the model was loaded; restore it, and "
                "the same command continues"
            )


def _stamp(path: Path) -> Sequence[int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


@contextmanager
def grader_pool() -> Iterator[ThreadPoolExecutor]:
    """Threads, since graders mostly wait for child processes; an interrupt does not wait."""
    pool = ThreadPoolExecutor(min(MAX_GRADERS, os.cpu_count() or 1), thread_name_prefix="grader")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
