"""An answer in progress: its parts until its deadline, and its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from coterie.server.answer import Delta
from coterie.server.api_error import ApiError
from coterie.server.responses import AnswerWriter, sse
from coterie.server.service import Service
from coterie.server.ticket import Outcome, Ticket

FRAME_SECONDS = 0.05  # between two chunks with frames


@dataclass(frozen=True)
class PendingAnswer:
    """The parts of an answer until its deadline; failures are raised as ApiError."""

    service: Service
    ticket: Ticket
    log: dict[str, object]

    @property
    def seconds_left(self) -> float:
        arrival = self.ticket.request.arrival
        return max(0.0, arrival + self.service.settings.deadline - time.monotonic())

    async def receive(self) -> tuple[Delta, Outcome | None]:
        """The next part, and the outcome at the end."""
        try:
            async with asyncio.timeout(self.seconds_left):
                delta, outcome = await self.ticket.receive()
        except TimeoutError:
            self.service.scheduler.cancel(self.ticket)
            seconds = self.service.settings.deadline
            message = f"no answer within {seconds:g} s"
            raise ApiError(504, message, code="deadline_exceeded") from None
        if outcome is not None:
            if outcome.error is not None:
                raise outcome.error
            self._log(outcome)
        return delta, outcome

    async def whole(self) -> tuple[Delta, Outcome]:
        """All parts as one."""
        delta, outcome = await self.receive()
        while outcome is None:
            part, outcome = await self.receive()
            delta = delta.joined(part)
        return delta, outcome

    def _log(self, outcome: Outcome) -> None:
        ticket, result = self.ticket, outcome.result
        assert result is not None
        self.log.update(
            finish_reason=outcome.finish_reason,
            prompt_tokens=result.prompt_tokens,
            completion_tokens=outcome.completion_tokens,
            forwards=result.forwards,
            queue_seconds=round((ticket.started or ticket.submitted) - ticket.submitted, 4),
        )


async def answer_events(
    answer: PendingAnswer, first: tuple[Delta, Outcome | None], writer: AnswerWriter
) -> AsyncIterator[bytes]:
    """The events of a stream; an error after its start is an event too."""
    pause = FRAME_SECONDS if answer.ticket.request.steps else 0.0
    delta, outcome = first
    for chunk in writer.first_chunk():
        yield chunk
    try:
        while True:
            for chunk in writer.chunk(delta):
                yield chunk
            if outcome is not None:
                break
            await asyncio.sleep(pause)
            delta, outcome = await answer.receive()
    except ApiError as error:
        answer.log.update(status=error.status_code, error=error.message)
        yield sse(error.document())
        return
    for chunk in writer.last_chunks(outcome):
        yield chunk
