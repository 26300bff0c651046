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

from coterie.engine.config import Generation
from coterie.engine.engine import Engine
from coterie.engine.source import find_folder
from coterie.evals.asking import Outcome, Question, outcomes
from coterie.evals.fingerprint import fingerprint
from coterie.evals.journal import Answer, AnswerKey, Journal
from coterie.evals.served import Served
from coterie.evals.sheet import Arm, Sheet
from coterie.evals.task import Grade, Item, Task
from coterie.naming import CoterieError

__all__ = ["Answer", "Arm", "Sheet", "Told", "run"]

CHUNK = 4  # times ``rows``: items that one arm answers before the next has its turn
GRADERS = 8
NOTHING: Mapping[str, object] = {}

Told = Callable[[Answer], None]
Graded = tuple[Outcome, Future[Grade]]


def run(
    engine: Engine,
    tasks: Sequence[Task],
    arms: Sequence[Arm],
    folder: Path | None,
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    rows: int = 16,
    lasts: int = 1,
    told: Told = lambda _: None,
    asked: Mapping[str, object] = NOTHING,
) -> list[Sheet]:
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
    named = {arm.name: arm for arm in arms}
    questions = _questions(engine, tasks, limit, shuffle_seed, asked)
    _check(engine, tasks, questions, named.values(), folder, rows=rows)
    told_apart = about(
        engine, tasks, limit=limit, shuffle_seed=shuffle_seed, lasts=lasts, asked=asked
    )
    turn = _Turn(engine, rows, lasts)
    with Journal(folder, told_apart) as journal, _graders() as graders:
        for name in named:
            for question in questions:
                if (found := journal.answers.get(_key(name, question))) is not None:
                    told(found)
        for chunk in turn.chunks(questions):
            for arm in named.values():
                for answers in turn.answers(arm, chunk, journal.answers, graders):
                    journal.add(answers)
                    for answer in answers:
                        told(answer)
        return [
            Sheet(arm, tuple(journal.answers[_key(name, question)] for question in questions))
            for name, arm in named.items()
        ]


def about(
    engine: Engine,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    lasts: int = 1,
    asked: Mapping[str, object] = NOTHING,
) -> dict[str, object]:
    """What makes two runs the same run, as JSON values; arms and ``rows`` do not."""
    model, memory = engine.model, None
    if model.rationed is not None and model.memory is not None:
        memory = {**model.memory.asked.document(), "slots": model.memory.slots, "lasts": lasts}
        if (coarse := model.memory.asked.coarse) is not None:
            memory["coarse"] = fingerprint(find_folder(coarse.folder))
    return {
        "model": None if model.folder is None else fingerprint(model.folder),
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "experts": None if (form := model.spec.expert_format) is None else str(form),
        "device": model.transformer.device.type,
        "memory": memory,
        "limit": limit,
        "shuffle_seed": shuffle_seed,
        "tasks": {
            task.name: {
                "settings": dict(task.settings()),
                "generation": _usual(engine, task, asked).document(),
                "items": len(items := _chosen(task, limit, shuffle_seed)),
                "questions": _digest(task, items),
            }
            for task in tasks
        },
    }


def _questions(
    engine: Engine,
    tasks: Sequence[Task],
    limit: int | None,
    shuffle_seed: int | None,
    asked: Mapping[str, object],
) -> list[Question]:
    return [
        Question(task, item, generation)
        for task in tasks
        for generation in [_usual(engine, task, asked)]
        for item in _chosen(task, limit, shuffle_seed)
    ]


def _chosen(task: Task, limit: int | None, shuffle_seed: int | None) -> list[Item]:
    """The items of a run, in its order; a task's do not depend on the other tasks."""
    items = list(task.items())
    if shuffle_seed is not None:
        random.Random(f"{task.name}/{shuffle_seed}").shuffle(items)
    return items[:limit]


@dataclass(frozen=True)
class _Turn:
    """How arms take turns: what is asked together, and what is in memory when it is."""

    engine: Engine
    rows: int
    lasts: int

    def chunks(self, questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
        """What one arm answers before the next has its turn; stretches of memory are whole."""
        size = CHUNK * self.rows
        if self.engine.model.rationed is not None:
            size = self.lasts * -(-CHUNK // self.lasts)
        return (questions[start : start + size] for start in range(0, len(questions), size))

    def answers(
        self,
        arm: Arm,
        chunk: Sequence[Question],
        known: Mapping[AnswerKey, Answer],
        graders: ThreadPoolExecutor,
    ) -> Iterator[list[Answer]]:
        """An arm's to what nobody knows yet, as they come."""
        if self.engine.model.rationed is None:
            left = [question for question in chunk if _key(arm.name, question) not in known]
            yield from _answers(self.engine, arm, left, self.rows, graders)
            return
        for start in range(0, len(chunk), self.lasts):
            stretch = chunk[start : start + self.lasts]
            unknown = [n for n, one in enumerate(stretch) if _key(arm.name, one) not in known]
            if not unknown:
                continue
            self.engine.empty()
            for found in _answers(self.engine, arm, stretch[: unknown[-1] + 1], 1, graders):
                yield [answer for answer in found if not _known(answer, known.get(answer.key))]


def _known(again: Answer, before: Answer | None) -> bool:
    """Raises where a question was answered otherwise before."""
    if before is not None and before.output != again.output:
        raise CoterieError(
            f"{again.arm}: {again.id} was answered otherwise before, so what it leaves in memory "
            "for the next is not known; name another folder"
        )
    return before is not None


def _answers(
    engine: Engine, arm: Arm, questions: Sequence[Question], rows: int, graders: ThreadPoolExecutor
) -> Iterator[list[Answer]]:
    """As they come."""
    name, beside = arm.name, _grades_beside(engine)
    grading: list[Graded] = []
    asked = [question.but(arm.generation) for question in questions]
    for ended in outcomes(engine, asked, arm.policy, rows=rows):
        grading += [(outcome, graders.submit(_grade, outcome)) for outcome in ended]
        done, grading = _split(grading, wait_for_all=not beside)
        yield [answer_of(name, outcome, future.result()) for outcome, future in done]
    done, _ = _split(grading, wait_for_all=True)
    yield [answer_of(name, outcome, future.result()) for outcome, future in done]


def _grades_beside(engine: Engine) -> bool:
    """Whether grading runs beside generation, as on a GPU; on a CPU it would be in its way."""
    return engine.model.transformer.device.type != "cpu"


def _split(grading: list[Graded], *, wait_for_all: bool) -> tuple[list[Graded], list[Graded]]:
    """Those that are graded, and those that are not."""
    if wait_for_all:
        wait([future for _, future in grading])
    done, others = [], []
    for graded in grading:
        (done if graded[1].done() else others).append(graded)
    return done, others


def _grade(outcome: Outcome) -> Grade:
    if outcome.result is None:
        return Grade(correct=False, extracted=None)
    return outcome.question.task.grade(outcome.result.text, outcome.question.item)


def answer_of(arm: str, outcome: Outcome, grade: Grade) -> Answer:
    """As it is kept."""
    result, question = outcome.result, outcome.question
    return Answer(
        arm=arm,
        task=question.task.name,
        id=question.item.id,
        correct=grade.correct,
        extracted=grade.extracted,
        also=dict(grade.also),
        output="" if result is None else result.text,
        finish="error" if result is None else result.finish_reason,
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
        served=None if result is None else Served.of(result.traffic),
    )


def _key(arm: str, question: Question) -> tuple[str, str, str]:
    return arm, question.task.name, question.item.id


def _usual(engine: Engine, task: Task, asked: Mapping[str, object]) -> Generation:
    return engine.generation.but(**task.generation()).but(**asked)


def _check(
    engine: Engine,
    tasks: Sequence[Task],
    questions: Sequence[Question],
    arms: Collection[Arm],
    folder: Path | None,
    *,
    rows: int,
) -> None:
    """Raises for what would fail at every item, or could not be gone on with."""
    if not tasks or not arms:
        raise CoterieError("an evaluation needs at least one task and one arm")
    if rows != 1 and engine.model.rationed is not None:
        raise CoterieError(
            f"{rows} rows together: where not all experts are in memory, an answer may depend on "
            "who is beside it; ask one by one"
        )
    asked = {question.task.name for question in questions}
    if empty := [task.name for task in tasks if task.name not in asked]:
        raise CoterieError(f"task {empty[0]} has no items")
    if folder is not None and engine.model.folder is None:
        raise CoterieError(f"{engine.model.name}: made in memory, so no folder can know it again")
    seen: set[tuple[str, str]] = set()
    for question in questions:
        task, item = question.task.name, question.item.id
        if (task, item) in seen:
            raise CoterieError(f"task {task}: two items have the id {item!r}")
        seen.add((task, item))
    anything = next(id for id in range(2) if id != engine.model.mask_id)
    for generation in {question.generation for question in questions}:
        for arm in arms:
            options = generation.but(**arm.generation).document()
            engine.cancel(engine.submit([anything], policy=arm.policy, **options))


def _digest(task: Task, items: Iterable[Item]) -> str:
    """Of prompts and golds: a changed file of questions is another run."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.id, task.prompt(item), item.gold]).encode() + b"\n")
    return digest.hexdigest()[:16]


@contextmanager
def _graders() -> Iterator[ThreadPoolExecutor]:
    """Threads, for what grading waits for are mostly children; an interrupt does not wait."""
    pool = ThreadPoolExecutor(min(GRADERS, os.cpu_count() or 1), thread_name_prefix="grader")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
