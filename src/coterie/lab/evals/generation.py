"""Generation of answers: a queue of items kept in one engine at a fixed batch size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from coterie.engine.engine import Engine
from coterie.engine.events import Finished, Result
from coterie.engine.generation_config import GenerationConfig, check_prompt
from coterie.errors import AnswerTextError, GenerationError, NonFiniteLogitsError, TokenizerError
from coterie.lab.evals.task import Item, Task
from coterie.loading.load import Model
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
    """A result, or the reason why there is none.

    The reasons are logits that are not finite, an unreadable prompt, and an answer without text.

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
    Raises every error of the engine but non-finite logits and those of one item's text.
    """
    waiting, active, seconds = deque(requests), dict[int, EvalRequest](), 0.0
    retries = deque[EvalRequest]()
    try:
        while waiting or active or retries:
            start = time.perf_counter()
            outcomes = list[GenerationOutcome]()
            # Requests that shared a forward with NaN logits are retried last and one at a time,
            # which isolates the request at fault.
            queue, room = (waiting, batch_size) if waiting or active else (retries, 1)
            while queue and len(active) < room:
                request = queue.popleft()
                submitted = _submit(engine, request, policy)
                if isinstance(submitted, GenerationOutcome):
                    outcomes.append(submitted)
                else:
                    active[submitted] = request
            if active:
                outcomes += _step(engine, active, retries)
            seconds += time.perf_counter() - start
            if outcomes:
                # The first outcome of a step carries its time, so that the sum is right.
                yield [replace(outcomes[0], seconds=seconds), *outcomes[1:]]
                seconds = 0.0
    finally:
        for row in set(active) & set(engine.rows):
            engine.cancel(row)


def read_prompt(model: Model, request: EvalRequest) -> list[int]:
    """The ids of an item's prompt; raises CoterieError for one that no request can have."""
    ids = model.tokenizer.encode(request.task.prompt(request.item))
    check_prompt(ids, model.special_ids, model.spec.vocabulary)
    return ids


def _submit(engine: Engine, request: EvalRequest, policy: str | Policy) -> int | GenerationOutcome:
    """The engine's row; the outcome of a prompt that is unreadable or leaves no room."""
    try:
        ids = read_prompt(engine.model, request)
    except (GenerationError, TokenizerError) as error:
        return GenerationOutcome(request, None, f"the prompt cannot be read: {error}")
    generation = request.generation.fit(len(ids), engine.model.spec.max_length)
    if generation is None:
        return GenerationOutcome(request, None, None)
    return engine.submit(ids, policy=policy, **vars(generation))


def _step(
    engine: Engine, active: dict[int, EvalRequest], retries: deque[EvalRequest]
) -> list[GenerationOutcome]:
    """The finished requests, removed from ``active``; those of a failed group go to ``retries``."""
    try:
        events = engine.step()
    except AnswerTextError as error:
        reason = f"the answer has no text: {error}"
        ended = [(row, active.pop(row)) for row in error.rows if row in active]
        return [GenerationOutcome(request, None, reason, row=row) for row, request in ended]
    except NonFiniteLogitsError as error:
        for row in error.rows:
            engine.cancel(row)
        requests = [active.pop(row) for row in error.rows]
        if len(requests) == 1:
            return [GenerationOutcome(requests[0], None, str(error), row=error.rows[0])]
        retries += requests
        return []
    finished = [e for e in events if isinstance(e, Finished) and e.row in active]
    return [GenerationOutcome(active.pop(e.row), e.result, None, row=e.row) for e in finished]
