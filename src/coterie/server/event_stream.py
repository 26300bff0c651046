"""Server-sent events that end when their reader does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coterie.server.api_error import ApiError

T = TypeVar("T")


class HungUpError(ApiError):
    """The client closed the connection; nothing reads this status but the log (as in nginx)."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection", code="client_closed")


async def or_hang_up(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """What the work returns; raises HungUpError, and ends the work, if the client hangs up.

    The body of the request must have been read.
    """
    task = asyncio.ensure_future(work)
    hang_up = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, hang_up}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise HungUpError
    finally:
        for each in (task, hang_up):
            each.cancel()
        # Both have ended before the caller goes on.
        await asyncio.gather(task, hang_up, return_exceptions=True)


class EventStream(Response):
    """Sends events as they come; ``on_close`` is called at the end, however it comes about.

    A reader so slow that the stream takes longer than ``seconds`` is cut off.
    """

    def __init__(
        self, events: AsyncIterator[bytes], *, on_close: Callable[[], None], seconds: float
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]  # it is not known
        self.events, self.on_close, self.seconds = events, on_close, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.seconds):
                await or_hang_up(self._send_all(send), receive)
        except (HungUpError, TimeoutError) as error:
            status = error.status_code if isinstance(error, HungUpError) else 504
            scope["state"]["log"].update(status=status)
        finally:
            self.on_close()

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self.events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
