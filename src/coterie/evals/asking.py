"""Questions in, outputs out: rows of one engine, each as soon as another is done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coterie.engine.config import Generation
from coterie.engine.engine import Engine
from coterie.engine.event import Finished, Result, Stuck
from coterie.evals.task import Item, Task
from coterie.values import Policy


@dataclass(frozen=True)
class Question:
    """One item, and how answers to its task are generated."""

    task: Task
    item: Item
    generation: Generation

    def but(self, options: Mapping[str, object]) -> Question:
        return replace(self, generation=self.generation.but(**options))


@dataclass(frozen=True)
class Outcome:
    """A result, or why there is none; ``seconds`` of generation since the outcome before, ``row``
    the engine's, which a refused question has not."""

    question: Question
    result: Result | None
    error: str | None
    seconds: float = 0.0
    row: int | None = None


def outcomes(
    engine: Engine, questions: Sequence[Question], policy: str | Policy, *, rows: int
) -> Iterator[list[Outcome]]:
    """The outcomes of each step that had any; what the caller does meanwhile costs no ``seconds``.

    Leaving early frees the rows.
    """
    asking, spent = _Asking(engine, policy, rows, deque(questions)), 0.0
    try:
        while asking.busy:
            began = time.perf_counter()
            ended = [*asking.fill(), *asking.step()]
            spent += time.perf_counter() - began
            if ended:
                # The first of a step bears its time, so that the sum over all is right.
                yield [replace(ended[0], seconds=spent), *ended[1:]]
                spent = 0.0
    finally:
        asking.leave()


@dataclass  # not frozen: it is the state of questions on their way
class _Asking:
    engine: Engine
    policy: str | Policy
    rows: int
    waiting: deque[Question]
    alone: list[Question] = field(default_factory=list)
    open: dict[int, Question] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.open or self.alone)

    def fill(self) -> Iterator[Outcome]:
        """Opens rows; a question that the engine refuses ends here.

        Those that shared a forward with broken numbers come last, one at a time: then it shows
        whose numbers they were.
        """
        if not self.waiting and not self.open and self.alone:
            yield from self._open(self.alone.pop(0))
        while self.waiting and len(self.open) < self.rows:
            yield from self._open(self.waiting.popleft())

    def step(self) -> Iterator[Outcome]:
        if not self.open:
            return
        try:
            events = self.engine.step()
        except Stuck as stuck:
            yield from self._unstick(stuck)
            return
        for event in events:
            if isinstance(event, Finished) and event.row in self.open:
                yield Outcome(self.open.pop(event.row), event.result, None, row=event.row)

    def leave(self) -> None:
        for number in set(self.open) & set(self.engine.rows):
            self.engine.cancel(number)

    def _open(self, question: Question) -> Iterator[Outcome]:
        generation = question.generation
        options = generation.document()
        try:
            prompt = question.task.prompt(question.item)
            self.open[self.engine.submit(prompt, policy=self.policy, **options)] = question
        # What the codec, the canvas or the engine refuse of one prompt is that item's failure.
        except ValueError as error:
            yield Outcome(question, None, str(error))

    def _unstick(self, stuck: Stuck) -> Iterator[Outcome]:
        for number in stuck.rows:
            self.engine.cancel(number)
            question = self.open.pop(number)
            if len(stuck.rows) == 1:
                yield Outcome(question, None, str(stuck), row=number)
            else:
                self.alone.append(question)
