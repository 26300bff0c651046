"""An exam: fresh held-out problems of the embedded tasks, answered under one policy at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from coterie.engine.engine import Engine
from coterie.engine.event import Finished, Result
from coterie.problems import TASKS, Problem, draw
from coterie.problems.grading import grade

Told = Callable[["Answer"], None]


@dataclass(frozen=True)
class Item:
    """One question of the exam; ``number`` is the same under every policy."""

    number: int
    problem: Problem


@dataclass(frozen=True)
class Answer:
    """What one policy made of one item."""

    item: Item
    policy: str
    right: bool
    result: Result


@dataclass(frozen=True)
class Sheet:
    """All answers of one policy, in the order of the items."""

    policy: str
    answers: tuple[Answer, ...]

    def right(self, task: str | None = None) -> list[bool]:
        """Item by item, of one task or of all."""
        return [a.right for a in self.answers if task in (None, a.item.problem.task)]

    @property
    def experts(self) -> float:
        """Unique experts a forward, over layers, forwards and items."""
        return self._by_forward(lambda result: result.experts.mean)

    @property
    def vote_mass_kept(self) -> float:
        return self._by_forward(lambda result: result.vote_mass_kept)

    @property
    def expert_bytes(self) -> float:
        """Bytes of experts a layer and forward."""
        return self._by_forward(lambda result: result.expert_bytes)

    @property
    def forwards_per_block(self) -> float:
        results = [answer.result for answer in self.answers]
        return sum(r.forwards for r in results) / sum(r.blocks for r in results)

    @property
    def new_tokens(self) -> float:
        """A mean item's."""
        return fmean(answer.result.new_tokens for answer in self.answers)

    def _by_forward(self, figure: Callable[[Result], float]) -> float:
        results = [answer.result for answer in self.answers]
        counted = [result.experts.forwards for result in results]
        # Where a plan looks at each block once, in a re-forward, no forward was the policy's.
        weights = counted if any(counted) else [1] * len(results)
        return fmean(map(figure, results), weights)


def items(tasks: Sequence[str], count: int, seed: int) -> list[Item]:
    """``count`` held-out problems of each task; a task's problems do not depend on the others."""
    drawn = [
        draw(TASKS[task], rng, "test")
        for task in tasks
        for rng in [random.Random(f"{task}/{seed}")]
        for _ in range(count)
    ]
    return [Item(number, problem) for number, problem in enumerate(drawn)]


def sit(engine: Engine, asked: Sequence[Item], policy: str, *, rows: int, told: Told) -> Sheet:
    """Answers every item, ``rows`` at a time; ``told`` hears of each answer as it comes."""
    answers: dict[int, Answer] = {}
    waiting = iter(asked)
    open_: dict[int, Item] = {}
    _fill(engine, open_, waiting, policy, rows)
    while open_:
        for event in engine.step():
            if isinstance(event, Finished):
                item = open_.pop(event.row)
                answer = Answer(item, policy, grade(item.problem, event.result.text), event.result)
                answers[item.number] = answer
                told(answer)
        _fill(engine, open_, waiting, policy, rows)
    return Sheet(policy, tuple(answers[item.number] for item in asked))


def _fill(
    engine: Engine, open_: dict[int, Item], waiting: Iterator[Item], policy: str, rows: int
) -> None:
    while len(open_) < rows:
        item = next(waiting, None)
        if item is None:
            return
        open_[engine.submit(item.problem.prompt, policy=policy)] = item
