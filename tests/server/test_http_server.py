"""The server as a process: killed and started again, and ended by a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIConnectionError, OpenAI

from coterie.errors import ConfigError
from coterie.server.http_server import bind
from coterie.server.settings import ServerSettings

SOURCES = Path(__file__).parents[2] / "src"
SLOW = {"unmask": "sequential:steps=32", "ignore_eos": True}
TURNS = [{"role": "user", "content": "Tom has 3 boxes of 4 pens. How many pens are there?"}]


@contextmanager
def process(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its URL."""
    command = [sys.executable, "-m", "coterie", "serve", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = ""
            while not url and (line := server.stderr.readline()):
                url = "".join(re.findall(r"on (http://\S+)/v1,", line))
            assert url, "the server did not start"
            yield server, url
        finally:
            server.kill()


def started_stream(url: str, max_tokens: int) -> tuple[OpenAI, Iterator[Any]]:
    """A client, and an answer of which one chunk has come."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    fields: dict[str, Any] = {"messages": TURNS, "max_tokens": max_tokens, "extra_body": SLOW}
    stream = client.chat.completions.create(model="embedded", stream=True, **fields)
    next(stream)
    return client, stream


@pytest.mark.slow
def test_a_killed_server_starts_again_on_its_port() -> None:
    with process() as (server, url):
        client, stream = started_stream(url, 300)
        server.kill()
        with client:
            with pytest.raises((APIConnectionError, httpx.HTTPError)):
                list(stream)
            with pytest.raises(APIConnectionError):
                client.models.list()
    with process(int(url.rpartition(":")[2])) as (_, url):
        client, stream = started_stream(url, 30)
        with client:
            assert list(stream)[-1].choices[0].finish_reason == "length"


def test_a_signal_lets_requests_finish() -> None:
    with process() as (server, url):
        client, stream = started_stream(url, 30)
        server.send_signal(signal.SIGTERM)
        with client:
            *_, last = stream
        assert last.choices[0].finish_reason == "length"
        assert server.wait(60) == 0
        lines = [json.loads(line) for line in server.stderr if line.startswith("{")]
    assert {"draining", "request"} <= {line["message"] for line in lines}
    assert next(line for line in lines if line["message"] == "request")["finish_reason"] == "length"


def test_two_servers_do_not_share_a_port() -> None:
    with bind(ServerSettings(port=0)) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}: Address already in use"):
            bind(ServerSettings(port=port))


def test_a_host_that_does_not_exist_is_named_with_a_reason() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.invalid.*: (?!Unknown error)\w"):
        bind(ServerSettings(host="nowhere.invalid"))


@pytest.mark.parametrize("host", ["::1", "::"])
def test_addresses_of_the_sixth_version_are_taken(host: str) -> None:
    """``::`` is every address, also of the fourth version."""
    with bind(ServerSettings(host=host, port=0)) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        for reached in ("::1", "127.0.0.1") if host == "::" else ("::1",):
            socket.create_connection((reached, port), timeout=10).close()


@pytest.mark.parametrize(
    "field", ["max_batch_size", "max_body_bytes", "deadline", "body_seconds", "max_queue", "drain"]
)
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_limit_is_a_number_that_can_work(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        ServerSettings(**{field: value})


def test_small_chunks_do_not_wait_for_the_reader() -> None:
    with bind(ServerSettings(port=0)) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
