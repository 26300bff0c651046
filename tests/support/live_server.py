"""A server on a real port, in a thread of the test."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny_tokenizer import write_tokenizer

import coterie
from coterie.engine.engine import Engine
from coterie.engine.events import Event
from coterie.engine.generation_config import GenerationConfig
from coterie.families.llada2 import CHAT_TEMPLATE
from coterie.loading.load import Model
from coterie.server.http_server import HttpServer, bind
from coterie.server.service import Service
from coterie.server.settings import ServerSettings
from coterie.testing import random_transformer, read_spec, tiny_config
from coterie.tokenizer import load_tokenizer

VOCABULARY, MASK, END = 261, 256, 257
# One token a forward, and no early end: a request that lasts.
SLOW = {"unmask": "sequential:steps=8", "ignore_eos": True}


@dataclass(frozen=True)
class LiveServer:
    """``url`` ends in the port; ``server`` runs in a thread."""

    url: str
    service: Service
    server: HttpServer

    def signal(self) -> None:
        """What a SIGTERM does."""
        self.server.loop.call_soon_threadsafe(self.server.on_signal)

    def wait_until_idle(self, seconds: float = 60.0) -> None:
        """Fails unless all rows are free soon."""
        wait_for(lambda: not self.service.scheduler.num_running, seconds)


@contextmanager
def live_server(engine: Engine, **settings: object) -> Iterator[LiveServer]:
    """A server of this engine; it ends with the context."""
    chosen, ports = ServerSettings(port=0, **settings), []
    service, started = Service.of(engine, chosen), threading.Event()

    def on_start(port: int) -> None:
        ports.append(port)
        started.set()

    with bind(chosen) as listener:
        server = HttpServer(service, on_start)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        assert started.wait(60)
        try:
            yield LiveServer(f"http://127.0.0.1:{ports[0]}", service, server)
        finally:
            server.force_exit = server.should_exit = True
            thread.join(60)


def text_of(stream: str) -> str:
    """The text of a stream of chunks that ended well."""
    *events, done = stream.strip().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Fails unless the condition holds soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@cache
def embedded_model() -> Model:
    return coterie.load().model


@cache
def byte_model() -> Model:
    """A random model of bytes: its answers are hardly ever valid UTF-8."""
    family, spec = read_spec(tiny_config("llada2") | {"vocab_size": VOCABULARY})
    with TemporaryDirectory() as folder:
        path = write_tokenizer(Path(folder))
        tokenizer = load_tokenizer(path, template=CHAT_TEMPLATE, vocab_size=VOCABULARY)
    return Model(
        name="bytes",
        family=family,
        transformer=random_transformer(spec, seed=1),
        tokenizer=tokenizer,
        mask_id=MASK,
        eos_ids=(END,),
    )


def byte_engine(seconds: float = 0.0) -> Engine:
    """An engine of this model, with a step that takes at least ``seconds``."""
    engine = Engine(byte_model(), generation=GenerationConfig(block=8, max_new_tokens=48))
    step = engine.step

    def slow_step() -> list[Event]:
        time.sleep(seconds)
        return step()

    engine.step = slow_step
    return engine
