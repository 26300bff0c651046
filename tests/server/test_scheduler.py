"""The thread that owns the engine: order, cancelled rows, and readers that are late."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
from live_server import byte_engine, wait_for

from coterie.engine.engine import Engine
from coterie.engine.events import Event
from coterie.server.answer import MAX_STEPS, Delta
from coterie.server.generation_request import GenerationRequest
from coterie.server.metrics import ServerMetrics
from coterie.server.scheduler import QueueFullError, Scheduler
from coterie.server.settings import ServerSettings
from coterie.server.ticket import Outcome, Ticket


def request(engine: Engine, number: int = 0, **options: object) -> GenerationRequest:
    generation = engine.generation.replace(early_stop="off", seed=number, **options)
    return GenerationRequest(
        id=str(number),
        prompt_ids=(5, 6, 7 + number),
        policy=engine.policy,
        generation=generation,
        steps=True,
    )


@contextmanager
def running(engine: Engine, **settings: object) -> Iterator[Scheduler]:
    scheduler = Scheduler(engine, ServerSettings(**settings), ServerMetrics(engine, "bytes"))
    scheduler.start()
    try:
        yield scheduler
    finally:
        scheduler.stop()
        assert not scheduler.is_alive


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def read(ticket: Ticket) -> tuple[Delta, Outcome]:
    """All of an answer."""
    delta, outcome = await ticket.receive()
    while outcome is None:
        part, outcome = await ticket.receive()
        delta = delta.joined(part)
    return delta, outcome


def test_first_come_first_served() -> None:
    engine, finished = byte_engine(), []

    async def test() -> None:
        async def finish(ticket: Ticket) -> None:
            await read(ticket)
            finished.append(ticket.request.id)

        with running(engine, max_batch_size=1) as scheduler:
            tickets = [scheduler.submit(request(engine, n, max_new_tokens=8)) for n in range(4)]
            await asyncio.gather(*map(finish, reversed(tickets)))

    run(test)
    assert finished == ["0", "1", "2", "3"]


def test_a_cancelled_row_runs_at_most_one_more_step() -> None:
    engine, active = byte_engine(0.01), []
    step = engine.step

    def recorded_step() -> list[Event]:
        active.append(engine.rows)
        return step()

    engine.step = recorded_step

    async def test() -> None:
        with running(engine) as scheduler:
            kept, cancelled = (
                scheduler.submit(request(engine, n, max_new_tokens=100)) for n in range(2)
            )
            await cancelled.receive()
            scheduler.cancel(cancelled)
            steps = len(active)
            await read(kept)
            assert all(1 not in rows for rows in active[steps + 1 :])
            assert len(active) > steps + 1
            scheduler.cancel(cancelled)  # again, and after the end: harmless
            scheduler.cancel(kept)

    run(test)


def test_the_engine_does_not_wait_for_a_reader_and_no_text_is_lost() -> None:
    engine = byte_engine()
    wanted = request(engine, max_new_tokens=200, unmask="sequential:steps=8")
    lone = Engine(engine.model).generate(
        list(wanted.prompt_ids), policy=wanted.policy, **vars(wanted.generation)
    )

    async def test() -> None:
        with running(engine) as scheduler:
            ticket = scheduler.submit(wanted)
            await asyncio.to_thread(wait_for, lambda: scheduler.num_running == 1)
            await asyncio.to_thread(wait_for, lambda: not scheduler.num_running)
            delta, outcome = await read(ticket)
        assert delta.text == lone.text
        assert outcome.result.tokens == lone.tokens
        assert len(delta.steps) == MAX_STEPS < lone.forwards

    run(test)


def test_a_queue_of_none_still_fills_the_rows() -> None:
    engine = byte_engine(0.01)

    async def test() -> None:
        with running(engine, max_batch_size=2, max_queue=0) as scheduler:
            for number in range(2):
                scheduler.submit(request(engine, number, max_new_tokens=200))
            with pytest.raises(QueueFullError):
                scheduler.submit(request(engine, 2))

    run(test)


def test_a_fault_in_one_answer_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = byte_engine()

    async def test() -> None:
        with running(engine) as scheduler:
            tickets = [scheduler.submit(request(engine, n, max_new_tokens=24)) for n in range(3)]
            monkeypatch.setattr(tickets[1].answer, "push", lambda *_: 1 / 0)
            outcomes = [(await read(ticket))[1] for ticket in tickets]
        assert [outcome.error is not None for outcome in outcomes] == [False, True, False]
        assert outcomes[1].error.status_code == 500
        assert engine.rows == ()

    run(test)
