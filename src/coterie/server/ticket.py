"""One submitted request, between the engine's thread and the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from coterie.decoding import Token
from coterie.engine.events import Denoised, Result
from coterie.server.answer import AnswerStream, Delta
from coterie.server.api_error import ApiError
from coterie.server.generation_request import GenerationRequest


@dataclass(frozen=True)
class Outcome:
    """How a request ended: ``error`` is None unless it failed."""

    finish_reason: str = "stop"
    result: Result | None = None
    completion_tokens: int = 0
    error: ApiError | None = None


class Ticket:
    """One submitted request, between the engine's thread and the event loop."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.answer = AnswerStream(request.stop_strings)
        self.is_cancelled = False
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.last_commit: float | None = None
        self._written: dict[int, Token] = {}
        self._num_final = 0
        self._lock = threading.Lock()
        self._delta, self._outcome = Delta(), None
        self._loop, self._arrival = asyncio.get_running_loop(), asyncio.Event()

    async def receive(self) -> tuple[Delta, Outcome | None]:
        """What has become final since the last call, and the outcome at the end."""
        await self._arrival.wait()
        self._arrival.clear()
        with self._lock:
            delta, self._delta = self._delta, Delta()
            return delta, self._outcome

    def push(self, delta: Delta, outcome: Outcome | None = None) -> None:
        """Adds to the delta; called by the engine's thread, which then wakes the reader."""
        with self._lock:
            self._delta = self._delta.joined(delta)
            self._outcome = self._outcome or outcome

    def end(self, outcome: Outcome) -> None:
        """The request has no more text; called by the engine's thread."""
        self.push(Delta(), outcome)
        self.wake()

    def wake(self) -> None:
        """Let the reader look; called by the engine's thread."""
        # The loop is closed when the process ends.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrival.set)

    def final_tokens(self, events: Iterable[Denoised], count: int) -> Sequence[Token]:
        """The tokens that became final, given the events and the number of final ones."""
        for event in events:
            self._written |= {token.position: token for token in (*event.committed, *event.edited)}
        first, self._num_final = self._num_final, max(self._num_final, count)
        positions = range(first, self._num_final)
        return [self._written[each] for each in positions if each in self._written]
