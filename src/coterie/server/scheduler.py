"""The scheduler: one thread owns the engine, and hands deltas to the event loop.

The engine never waits for a reader: a ticket holds one delta, which grows until it is read.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from coterie.decoding import Token
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised, Event, Finished, Result
from coterie.errors import (
    AnswerTextError,
    CoterieError,
    NonFiniteLogitsError,
    clip,
)
from coterie.offload.traffic import Traffic
from coterie.server.answer import Delta, Step
from coterie.server.api_error import ApiError, internal_error
from coterie.server.generation_request import GenerationRequest
from coterie.server.logs import FIELDS
from coterie.server.metrics import ServerMetrics
from coterie.server.settings import ServerSettings
from coterie.server.ticket import Outcome, Ticket
from coterie.server.votes import VoteRecorder

RETRIES = 3  # of a step that failed for a reason outside its requests
RETRY_SECONDS = 0.05
LOG = logging.getLogger("coterie.server")


class QueueFullError(Exception):
    """The queue is full: ``max_queue`` requests wait."""


@dataclass  # not frozen: the engine's thread and the event loop write to it
class Scheduler:
    """Serves requests first come, first served; ``max_batch_size`` of them share forwards."""

    engine: Engine
    settings: ServerSettings
    metrics: ServerMetrics
    _waiting: deque[Ticket] = field(default_factory=deque)
    _rows: dict[int, Ticket] = field(default_factory=dict)
    _condition: threading.Condition = field(default_factory=threading.Condition)
    _is_draining: bool = False
    _is_stopped: bool = False
    _failures: int = 0
    _num_starting: int = 0  # requests that have left the queue and have no row yet
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._votes = VoteRecorder.of(self.engine.model)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Ticket:
        """Queue a request; called in the event loop. Raises QueueFullError, or ApiError (503)."""
        with self._condition:
            if self._is_draining or not self.is_alive:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            # A free row is no queue: even with a queue of 0, it takes a request.
            free = self.settings.max_batch_size - self.num_running
            if len(self._waiting) >= self.settings.max_queue + max(0, free):
                raise QueueFullError
            ticket = Ticket(request)
            self._waiting.append(ticket)
            self._condition.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request; its row is free before the next step. Harmless after the end."""
        with self._condition:
            ticket.is_cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self.metrics.on_cancelled()
            self._condition.notify()

    async def drain(self, timeout: float) -> bool:
        """Take no more requests, and wait for those that were taken; False if time ran out."""
        with self._condition:
            self._is_draining = True
        end = time.monotonic() + timeout
        while self.num_running or self.num_waiting:
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.02)
        return True

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread, and the requests that still run."""
        with self._condition:
            self._is_draining = self._is_stopped = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether a request would be taken."""
        is_full = len(self._waiting) >= self.settings.max_queue > 0
        return self.is_alive and not self._is_draining and not is_full

    @property
    def num_running(self) -> int:
        return len(self._rows) + self._num_starting

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def stats(self) -> Mapping[str, int]:
        """Requests with a row, and without."""
        return {"running": self.num_running, "waiting": self.num_waiting}

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._waiting or self._rows or self._is_stopped):
                    self._condition.wait()
                if self._is_stopped:
                    break
            try:
                self._cancel_rows()
                self._admit()
                if self._rows:
                    self._step()
            except Exception:
                LOG.exception("the engine's thread failed")
                self._fail(list(self._rows), internal_error())
        stopping = ApiError(503, "the server is shutting down", code="shutting_down")
        self._fail(list(self._rows), stopping)
        for ticket in list(self._waiting):
            ticket.end(Outcome(error=stopping))

    def _cancel_rows(self) -> None:
        """Free the rows of requests that were cancelled."""
        for number, ticket in list(self._rows.items()):
            if ticket.is_cancelled:
                self.metrics.on_cancelled()
                self._remove(number)

    def _admit(self) -> None:
        """Give free rows to the requests that have waited longest."""
        while len(self._rows) < self.settings.max_batch_size:
            with self._condition:
                if not self._waiting:
                    return
                self._num_starting = 1
                ticket = self._waiting.popleft()
            self._start(ticket)
            self._num_starting = 0

    def _start(self, ticket: Ticket) -> None:
        request = ticket.request
        try:
            number = self.engine.submit(
                request.prompt_ids, policy=request.policy, **vars(request.generation)
            )
        except CoterieError as error:
            return ticket.end(Outcome(error=ApiError(400, str(error))))
        except Exception:
            LOG.exception("a request could not start", extra={"request_id": request.id})
            return ticket.end(Outcome(error=internal_error()))
        self._rows[number] = ticket
        ticket.started = time.monotonic()
        self.metrics.on_started(ticket.started - ticket.submitted)
        if request.votes:
            self._votes.watch(number, request.policy)
            self.engine.set_recorder(self._votes)
        return None

    def _step(self) -> None:
        """Run one step of the engine; the requests of a failed forward end, all others go on."""
        before, start = self.engine.traffic(), time.perf_counter()
        try:
            events = self.engine.step()
        except (NonFiniteLogitsError, AnswerTextError) as error:
            self._fail(error.rows, ApiError(500, str(error), code="generation_failed"))
            return
        except (CoterieError, OSError) as error:
            self._retry(error)
            return
        self._failures = 0
        moved = None if before is None else self.engine.traffic(before)
        self.metrics.on_step(time.perf_counter() - start, events, moved)
        self._deliver(events, moved)
        if not events and not self.engine.rows:
            raise RuntimeError("requests wait for an engine that has none")

    def _retry(self, error: Exception) -> None:
        """The error says nothing about the requests: repeat the step, but not for ever."""
        self._failures += 1
        LOG.warning("step %d failed: %s", self._failures, clip(str(error), 300))
        if self._failures > RETRIES:
            self._failures = 0
            self._fail(list(self._rows), internal_error())
        else:
            time.sleep(RETRY_SECONDS * self._failures)

    def _deliver(self, events: Sequence[Event], traffic: Traffic | None) -> None:
        by_row: defaultdict[int, list[Event]] = defaultdict(list)
        for event in events:
            by_row[event.row].append(event)
        for number, of_row in by_row.items():
            if (ticket := self._rows.get(number)) is None:
                continue
            try:
                self._deliver_row(number, ticket, of_row, traffic)
            except Exception:
                LOG.exception("an answer failed", extra={"request_id": ticket.request.id})
                self._fail([number], internal_error())

    def _deliver_row(
        self, number: int, ticket: Ticket, events: Sequence[Event], traffic: Traffic | None
    ) -> None:
        denoised = [event for event in events if isinstance(event, Denoised)]
        result = next((event.result for event in events if isinstance(event, Finished)), None)
        text = "".join(event.text for event in denoised)
        delta = ticket.answer.push(text, self._tokens(number, ticket, denoised, result))
        steps = self._steps(number, ticket, denoised, traffic)
        outcome = None
        if ticket.answer.stopped:
            result = result or self.engine.result(number)
            count, rest = ticket.answer.tokens_before_stop(
                result.tokens, self.engine.model.tokenizer.decode
            )
            delta = delta.joined(rest)
            outcome = Outcome("stop", result, count)
        elif result is not None:
            delta = delta.joined(ticket.answer.finish())
            outcome = Outcome(result.finish_reason, result, result.new_tokens)
        if any(event.committed for event in denoised):
            self.metrics.on_commit(ticket)
        if outcome is not None:
            self._remove(number)
            self.metrics.on_finished(ticket, outcome)
            self.metrics.on_prefix_cache(self.engine.prefix_cache_stats())
        if delta != Delta() or steps or outcome is not None:
            ticket.push(delta.joined(Delta(steps=steps)), outcome)
            ticket.wake()

    def _tokens(
        self, number: int, ticket: Ticket, events: Sequence[Denoised], result: Result | None
    ) -> Sequence[Token]:
        if not ticket.request.logprobs:
            return ()
        if result is not None:
            return ticket.final_tokens(events, result.new_tokens)
        return ticket.final_tokens(events, len(self.engine.sequence(number).final_tokens))

    def _steps(
        self, number: int, ticket: Ticket, events: Sequence[Denoised], traffic: Traffic | None
    ) -> tuple[Step, ...]:
        if not ticket.request.steps:
            return ()
        seconds = time.monotonic() - (ticket.started or ticket.submitted)
        votes = self._votes.latest(number) if ticket.request.votes else None
        return tuple(
            Step(event, votes if event.kind == "decode" else None, traffic, seconds)
            for event in events
        )

    def _remove(self, number: int) -> Ticket:
        """The ticket of a row, which is free again."""
        ticket = self._rows.pop(number)
        if number in self.engine.rows:
            self.engine.cancel(number)
        self._votes.unwatch(number)
        if self._votes.is_idle:
            self.engine.set_recorder(None)
        return ticket

    def _fail(self, numbers: Iterable[int], error: ApiError) -> None:
        """End requests with an error, and log the id of each."""
        for number in [number for number in numbers if number in self._rows]:
            ticket = self._remove(number)
            ticket.end(Outcome(error=error))
            self.metrics.on_failed()
            LOG.warning(
                "request failed",
                extra={"request_id": ticket.request.id, FIELDS: {"error": error.message}},
            )
