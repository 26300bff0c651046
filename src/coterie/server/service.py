"""What the endpoints of a server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.server.api_error import ApiError
from coterie.server.generation_request import GenerationRequest
from coterie.server.metrics import ServerMetrics
from coterie.server.scheduler import QueueFullError, Scheduler
from coterie.server.settings import ServerSettings
from coterie.server.ticket import Ticket

RETRY_AFTER = "1"  # seconds
T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """What the endpoints share. Tokenizing runs in ``threads``: templates may take seconds."""

    engine: Engine
    settings: ServerSettings
    scheduler: Scheduler
    metrics: ServerMetrics
    created: int = field(default_factory=lambda: int(time.time()))
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tokenizer"))

    @staticmethod
    def of(engine: Engine, settings: ServerSettings) -> Service:
        metrics = ServerMetrics(engine, settings.model_name)
        scheduler = Scheduler(engine, settings, metrics)
        metrics.watch_queue(lambda: scheduler.num_running, lambda: scheduler.num_waiting)
        return Service(engine, settings, scheduler, metrics)

    async def in_thread(self, call: Callable[[], T], *, param: str | None = None) -> T:
        """What the call returns; an error of the package is the client's, in field ``param``."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, call)
        except CoterieError as error:
            raise ApiError(400, str(error), param=param) from None

    def check_model(self, name: str | None) -> None:
        """Raises for a model that is not the one served."""
        if name not in (None, self.settings.model_name):
            served = self.settings.model_name
            raise ApiError(
                404, f"{name!r} is not served here; {served!r} is", param="model",
                code="model_not_found",
            )  # fmt: skip

    def submit(self, request: GenerationRequest) -> Ticket:
        try:
            return self.scheduler.submit(request)
        except QueueFullError:
            raise ApiError(
                429, "too many requests wait; try again later", code="queue_full",
                headers={"retry-after": RETRY_AFTER},
            ) from None  # fmt: skip
