"""Generation of answers: a queue of items kept in one engine at a fixed batch size."""

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
    """One item and the generation options of its task."""

    task: Task
    item: Item
    generation: GenerationConfig

    def replace(self, options: Mapping[str, object]) -> EvalRequest:
        return replace(self, generation=self.generation.replace(**options))


@dataclass(frozen=True)
class GenerationOutcome:
    """A result, or the reason why the model's logits were not finite.

    A prompt that leaves no room for an answer has neither, and no ``row`` of the engine.
    ``seconds`` is the generation time since the previous outcome.
    """

    request: EvalRequest
    result: Result | None
    error: str | None
    seconds: float = 0.0
    row: int | None = None


def generate_outcomes(
    engine: Engine, requests: Sequence[EvalRequest], policy: str | Policy, *, batch_size: int
) -> Iterator[list[GenerationOutcome]]:
    """Yields the outcomes of each step that has any; ``seconds`` excludes the caller's work.

    ``max_new_tokens`` is cut to what fits beside the prompt. Closing the iterator cancels its rows.
    Raises every error of the engine but non-finite logits.
    """
    batch, seconds = _RequestBatch(engine, policy, batch_size, deque(requests)), 0.0
    try:
        while batch.has_work:
            start = time.perf_counter()
            finished = [*batch.admit(), *batch.step()]
            seconds += time.perf_counter() - start
            if finished:
                # The first outcome of a step carries its time, so that the sum is right.
                yield [replace(finished[0], seconds=seconds), *finished[1:]]
                seconds = 0.0
    finally:
        batch.cancel_all()


@dataclass  # not frozen: holds the requests in progress
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
        """Submits requests up to the batch size; yields those that have no room for an answer.

        Requests that shared a forward with NaN logits are retried last and one at a time, which
        isolates the request at fault.
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
                request = self.active.pop(event.row)
                yield GenerationOutcome(request, event.result, None, row=event.row)

    def cancel_all(self) -> None:
        for row in set(self.active) & set(self.engine.rows):
            self.engine.cancel(row)

    def _submit(self, request: EvalRequest) -> Iterator[GenerationOutcome]:
        model = self.engine.model
        ids = model.tokenizer.encode(request.task.prompt(request.item))
        generation = request.generation.fit(len(ids), model.spec.max_length)
        if generation is None:
            yield GenerationOutcome(request, None, None)
            return
        number = self.engine.submit(ids, policy=self.policy, **generation.document())
        self.active[number] = request

    def _isolate_failure(self, error: NonFiniteLogitsError) -> Iterator[GenerationOutcome]:
        for row in error.rows:
            self.engine.cancel(row)
            request = self.active.pop(row)
            if len(error.rows) == 1:
                yield GenerationOutcome(request, None, str(error), row=row)
            else:
                self.retries.append(request)
