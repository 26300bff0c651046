"""Questions in, outputs out: rows of one engine, each as soon as another is done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coterie.engine.engine import Engine
from coterie.engine.events import Finished, Result
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import NonFiniteLogitsError
from coterie.lab.evals.task import Item, Task
from coterie.values import Policy


@dataclass(frozen=True)
class EvalRequest:
    """One item, and how answers to its task are generated."""

    task: Task
    item: Item
    generation: GenerationConfig

    def replace(self, options: Mapping[str, object]) -> EvalRequest:
        return replace(self, generation=self.generation.replace(**options))


@dataclass(frozen=True)
class GenerationOutcome:
    """A result, or why there is none; ``seconds`` of generation since the outcome before, ``row``
    the engine's, which a refused question has not."""

    request: EvalRequest
    result: Result | None
    error: str | None
    seconds: float = 0.0
    row: int | None = None


def generate_outcomes(
    engine: Engine, requests: Sequence[EvalRequest], policy: str | Policy, *, batch_size: int
) -> Iterator[list[GenerationOutcome]]:
    """The outcomes of each step that had any; what the caller does meanwhile costs no ``seconds``.

    Leaving early frees the rows.
    """
    batch, seconds = _RequestBatch(engine, policy, batch_size, deque(requests)), 0.0
    try:
        while batch.has_work:
            start = time.perf_counter()
            finished = [*batch.admit(), *batch.step()]
            seconds += time.perf_counter() - start
            if finished:
                # The first of a step bears its time, so that the sum over all is right.
                yield [replace(finished[0], seconds=seconds), *finished[1:]]
                seconds = 0.0
    finally:
        batch.cancel_all()


@dataclass  # not frozen: it is the state of questions on their way
class _RequestBatch:
    engine: Engine
    policy: str | Policy
    batch_size: int
    waiting: deque[EvalRequest]
    retries: list[EvalRequest] = field(default_factory=list)
    active: dict[int, EvalRequest] = field(default_factory=dict)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.active or self.retries)

    def admit(self) -> Iterator[GenerationOutcome]:
        """Opens rows; a question that the engine refuses ends here.

        Those that shared a forward with broken numbers come last, one at a time: then it shows
        whose numbers they were.
        """
        if not self.waiting and not self.active and self.retries:
            yield from self._submit(self.retries.pop(0))
        while self.waiting and len(self.active) < self.batch_size:
            yield from self._submit(self.waiting.popleft())

    def step(self) -> Iterator[GenerationOutcome]:
        if not self.active:
            return
        try:
            events = self.engine.step()
        except NonFiniteLogitsError as error:
            yield from self._isolate_failure(error)
            return
        for event in events:
            if isinstance(event, Finished) and event.row in self.active:
                yield GenerationOutcome(
                    self.active.pop(event.row), event.result, None, row=event.row
                )

    def cancel_all(self) -> None:
        for row in set(self.active) & set(self.engine.rows):
            self.engine.cancel(row)

    def _submit(self, request: EvalRequest) -> Iterator[GenerationOutcome]:
        generation = request.generation
        options = generation.document()
        try:
            prompt = request.task.prompt(request.item)
            self.active[self.engine.submit(prompt, policy=self.policy, **options)] = request
        # What the codec, the canvas or the engine refuse of one prompt is that item's failure.
        except ValueError as error:
            yield GenerationOutcome(request, None, str(error))

    def _isolate_failure(self, error: NonFiniteLogitsError) -> Iterator[GenerationOutcome]:
        for row in error.rows:
            self.engine.cancel(row)
            request = self.active.pop(row)
            if len(error.rows) == 1:
                yield GenerationOutcome(request, None, str(error), row=row)
            else:
                self.retries.append(request)
