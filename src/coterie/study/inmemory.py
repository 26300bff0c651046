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
from coterie.engine.load import Model
from coterie.evals.asking import Outcome, Question, outcomes
from coterie.evals.run import GRADERS, answer_of
from coterie.evals.sheet import Arm, Sheet
from coterie.evals.task import Grade, Task
from coterie.experts.book import Book
from coterie.experts.imagined import Imagined
from coterie.model.moe import MoE
from coterie.naming import CoterieError
from coterie.routing import respell
from coterie.study.lab import ROWS
from coterie.study.logbook import Entry, Logbook, Uses
from coterie.values import Demand, Store

Counts = NDArray[np.int64]
Tell = Callable[[float], None]


@dataclass(frozen=True)
class Asked:
    """One run: an arm, the first so many questions, and the slots of each layer that the policy is
    told of; None for one that does not ask who is in memory."""

    arm: Arm
    items: int
    slots: int | None = None

    @property
    def file(self) -> str:
        """Of its logbook."""
        slots = "" if self.slots is None else f" slots={self.slots}"
        return f"{self.arm.name}{slots}".replace("/", "+") + ".jsonl"


@dataclass(frozen=True)
class Moves:
    """What one memory served: experts used and brought, [F, L], and which answer [F] a forward was
    for; which of them decoded."""

    used: Counts
    loads: Counts
    answers: Counts
    decoded: NDArray[np.bool_]

    def by_answer(self, counts: Counts, answers: int) -> Counts:
        """[answers]: the sum over layers and forwards."""
        found = np.zeros(answers, dtype=np.int64)
        np.add.at(found, self.answers, counts.sum(-1))
        return found


def moves(entries: Sequence[Entry], capacity: int) -> Moves:
    """Of answers given one after the other, in a memory that is empty before the first and lives on
    from each to the next; LRU."""
    used = np.concatenate([entry.used for entry in entries])
    book = Book(used.shape[-1], capacity)
    loads = [[book.enter(layer, one) for layer, one in enumerate(forward)] for forward in used]
    lengths = [len(entry.kinds) for entry in entries]
    return Moves(
        used=used.sum(-1),
        loads=np.array(loads, dtype=np.int64).reshape(used.shape[:2]),
        answers=np.repeat(np.arange(len(entries)), lengths),
        decoded=np.array([kind == "d" for entry in entries for kind in entry.kinds]),
    )


def questions(tasks: Sequence[Task], items: int, engine: Engine) -> list[Question]:
    """The first ``items``, the tasks taking turns, so that fewer are the beginning of more."""
    asked = [
        [Question(task, item, generation) for item in task.items()]
        for task in tasks
        for generation in [engine.generation.but(**task.generation())]
    ]
    turns = chain.from_iterable(zip_longest(*asked))
    return [question for question in turns if question is not None][:items]


def answered(
    engine: Engine, tasks: Sequence[Task], asked: Asked, folder: Path, tell: Tell
) -> list[Entry]:
    """Every question's entry, in their order; those that the folder's logbook holds stand.

    A policy that is told who is in memory answers one question at a time, as ``moves`` counts.
    """
    model, wanted = engine.model, questions(tasks, asked.items, engine)
    shape = len(model.spec.moe_layers), model.spec.router.experts
    with Logbook(_place(folder, asked.file), shape) as book:
        left = [q.but(asked.arm.generation) for q in wanted if _key(q) not in book.entries]
        told = _alone if asked.slots is not None else _together
        for entries in told(engine, asked, left, book) if left else ():
            book.add(entries)
            tell(len(book.entries) / len(wanted))
        found = [book.entries[_key(question)] for question in wanted]
    if all(entry.answer.error for entry in found):
        raise CoterieError(f"{asked.arm.name}: no item got an answer: {found[0].answer.error}")
    return found


def _place(folder: Path, name: str) -> Path:
    """The logbook of this name, or the one whose name spells the same policy as before."""
    others = (path for path in sorted(folder.glob("*.jsonl")) if respell(path.name) == name)
    return next(others, folder / name)


def sheet(asked: Asked, entries: Sequence[Entry]) -> Sheet:
    """The answers task by task, as sheets have them."""
    tasks = dict.fromkeys(entry.answer.task for entry in entries)
    ordered = [entry.answer for task in tasks for entry in entries if entry.answer.task == task]
    return Sheet(asked.arm, tuple(ordered))


def imagining(model: Model, store: Callable[[Store], Store]) -> Model:
    """The same model, its experts behind another store."""
    networks = [layer.feed_forward for layer in model.transformer.layers]
    own = {id(one.store): one.store for one in networks if isinstance(one, MoE)}
    behind = {name: store(one) for name, one in own.items()}
    layers = tuple(
        replace(layer, feed_forward=replace(one, store=behind[id(one.store)]))
        if isinstance(one := layer.feed_forward, MoE)
        else layer
        for layer in model.transformer.layers
    )
    return replace(model, transformer=replace(model.transformer, layers=layers))


def _together(
    engine: Engine, asked: Asked, left: Sequence[Question], book: Logbook
) -> Iterator[list[Entry]]:
    """Many rows at once: nobody's answer depends on another's."""
    del book
    yield from _entries(engine.model, engine, asked, left, rows=ROWS)


def _alone(
    engine: Engine, asked: Asked, left: Sequence[Question], book: Logbook
) -> Iterator[list[Entry]]:
    """One after the other; after one that failed the memory is made again from the logbook, for
    nobody knows what was in it then."""
    waiting = list(left)
    while waiting:
        model = _as_left(engine.model, asked, book)
        for entries in _entries(model, engine, asked, waiting, rows=1):
            yield entries
            waiting = waiting[len(entries) :]
            if any(entry.answer.error for entry in entries):
                break


def _as_left(model: Model, asked: Asked, book: Logbook) -> Model:
    """The model behind a memory that has served all that the logbook holds."""
    slots, layers = asked.slots or 1, model.spec.moe_layers

    def store(own: Store) -> Store:
        memory = Imagined(own, model.spec.router.experts, slots, device=model.transformer.device)
        for entry in book.entries.values():
            for forward in entry.used:
                for layer, used in zip(layers, forward, strict=True):
                    for _ in memory.serve(layer, Demand(torch.from_numpy(used))):
                        pass
        return memory

    return imagining(model, store)


def _entries(
    model: Model, engine: Engine, asked: Asked, left: Sequence[Question], *, rows: int
) -> Iterator[list[Entry]]:
    """As they come, graded."""

    def kind(row: int) -> str:
        look = own.row(row).look
        return "" if look is None else look.kind

    spec, policy = model.spec, asked.arm.policy
    uses = Uses(kind, (len(spec.moe_layers), spec.router.experts))
    own = Engine(model, generation=engine.generation, watcher=uses, every=True)
    with ThreadPoolExecutor(GRADERS) as graders:
        for ended in outcomes(own, left, policy, rows=rows):
            grades = graders.map(_grade, ended)
            yield [
                Entry(answer_of(asked.arm.name, one, grade), *uses.take(one.row))
                for one, grade in zip(ended, grades, strict=True)
            ]


def _grade(outcome: Outcome) -> Grade:
    if outcome.result is None:
        return Grade(correct=False, extracted=None)
    return outcome.question.task.grade(outcome.result.text, outcome.question.item)


def _key(question: Question) -> tuple[str, str]:
    return question.task.name, question.item.id
