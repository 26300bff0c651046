"""The process: loads nothing, listens, and ends on a signal after running requests have."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from coterie.engine.engine import Engine
from coterie.errors import ConfigError
from coterie.server.app import make_app
from coterie.server.logs import FIELDS, configure_logs
from coterie.server.service import Service
from coterie.server.settings import ServerSettings

SWITCH_SECONDS = 0.001  # after which a thread that computes in Python lets another one run
KEEP_ALIVE_SECONDS = 75  # longer than clients keep theirs, so that none writes to a closed one
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOG = logging.getLogger("coterie.server")


class HttpServer(uvicorn.Server):
    """A server that a first signal drains, and a second one ends at once."""

    def __init__(self, service: Service, on_start: Callable[[int], None]) -> None:
        self.service, self.on_start = service, on_start
        self._num_signals = 0
        config = uvicorn.Config(
            make_app(service),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            lifespan="off",
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loop = asyncio.get_running_loop()
        for number in SIGNALS:
            # Only the main thread of a program gets signals.
            with suppress(ValueError, RuntimeError):
                self.loop.add_signal_handler(number, self.on_signal)
        self.service.scheduler.start()
        self.on_start(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.service.scheduler.stop(0.0 if self.force_exit else 5.0)
        self.service.threads.shutdown(wait=False, cancel_futures=True)

    def on_signal(self) -> None:
        """Drain, or after the first signal, end."""
        self._num_signals += 1
        if self._num_signals == 1:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            LOG.warning("a second signal: running requests are lost")
            self.force_exit = self.should_exit = True

    async def _drain(self) -> None:
        scheduler, seconds = self.service.scheduler, self.service.settings.drain
        LOG.info("draining", extra={FIELDS: {**scheduler.stats(), "seconds": seconds}})
        if not await scheduler.drain(seconds):
            LOG.warning("requests are given up", extra={FIELDS: dict(scheduler.stats())})
            await asyncio.to_thread(scheduler.stop)
        # Responses that have their answer are sent within the time of a graceful shutdown.
        self.should_exit = True


def serve(
    engine: Engine,
    settings: ServerSettings,
    listener: socket.socket,
    on_start: Callable[[int], None],
) -> None:
    """Serve until a signal; ``on_start`` gets the port once connections are accepted."""
    configure_logs()
    sys.setswitchinterval(SWITCH_SECONDS)
    service = Service.of(engine, settings)
    HttpServer(service, on_start).run([listener])
    if service.scheduler.is_alive:
        # A step still runs: the interpreter cannot end before it does.
        logging.shutdown()
        os._exit(1)


def bind(settings: ServerSettings) -> socket.socket:
    """A socket that does not listen yet; raises ConfigError where another program listens.

    It is cheap, so that a port in use is reported before a model is loaded.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: else a small chunk waits 40 ms for the reader to confirm the last.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        where, number = f"{settings.host}:{settings.port}", error.errno or 0
        reason = os.strerror(number) if number > 0 else "no such address"  # below 0: the resolver's
        raise ConfigError(f"cannot listen on {where}: {reason}") from None
    return listener
