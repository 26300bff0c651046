"""What a server refuses, ends and survives, over plain connections to a tiny random model."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import SLOW, LiveServer, byte_engine, live_server, text_of, wait_for

from coterie.errors import NonFiniteLogitsError, OffloadError
from coterie.server.settings import AllowedOptions

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
JSON = {"content-type": "application/json"}
KEY = {"authorization": "Bearer secret"}
LONG = {"messages": MESSAGES, "max_tokens": 300, **SLOW}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(byte_engine(), max_body_bytes=50_000, body_seconds=1.0) as live:
        yield live


@pytest.fixture(scope="module")
def slow() -> Iterator[LiveServer]:
    """Its one row takes seconds."""
    with live_server(byte_engine(0.01), max_batch_size=1) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as chosen:
        yield chosen


def ask(server: LiveServer, body: dict[str, object], **options: Any) -> httpx.Response:
    """The answer to a chat request, however slow the machine is; certificates take long to load."""
    return httpx.post(f"{server.url}{CHAT}", json=body, timeout=60, verify=False, **options)


def status(server: LiveServer, path: str) -> int:
    return httpx.get(f"{server.url}{path}", timeout=60, verify=False).status_code


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error, which has OpenAI's four keys and says nothing of the server's code."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not re.search(r"Traceback|\.py", answer.text)
    return error


@settings(max_examples=6)
@given(
    st.text(max_size=8),
    st.integers(0, 2**40),
    st.sampled_from([0.0, 3.0]),
    st.lists(st.sampled_from("aé\ufffd0"), max_size=2),
)
def test_any_stream_is_the_whole(
    client: httpx.Client, prompt: str, seed: int, temperature: float, stop: list[str]
) -> None:
    """Most of these answers are no valid UTF-8, whose pieces must not be cut."""
    body = {
        "messages": [{"role": "user", "content": prompt}], "seed": seed, "max_tokens": 9,
        "temperature": temperature, "stop": stop,
    }  # fmt: skip
    whole = client.post(CHAT, json=body)
    if whole.status_code == 400:
        assert "surrogate" in whole.text or "UTF-8" in whole.text or "mask" in whole.text
        return
    streamed = client.post(CHAT, json=body | {"stream": True})
    assert text_of(streamed.text) == whole.json()["choices"][0]["message"]["content"]


BAD_BODIES = {
    "cut off": b'{"messages": [',
    "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
    "half a surrogate pair": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "a surrogate in a field": b'{"messages": [], "\\ud800": 1}',
    "nested without end": b"[" * 40_000,
    "a number without end": b'{"seed": ' + b"9" * 5000 + b"}",
    "not a number": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "empty": b"",
    "null": b"null",
    "a list": b"[1]",
    "no messages": b'{"messages": []}',
    "an image": b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    "a mask": b'{"messages": [{"role": "user", "content": "<|mask|>"}]}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_the_clients_error(client: httpx.Client, name: str) -> None:
    answer = client.post(
        CHAT, content=BAD_BODIES[name], headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    error_of(answer)


NAMES = st.sampled_from(
    ["messages", "role", "content", "stop", "n", "stream", "policy", "max_tokens", "coterie"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_no_body_breaks_the_server(client: httpx.Client, body: object) -> None:
    answer = client.post(CHAT, content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code < 500


def test_a_body_without_end_is_refused(client: httpx.Client) -> None:
    answer = client.post(CHAT, json={"messages": [{"role": "user", "content": "a" * 60_000}]})
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "body_too_large"

    def pieces() -> Iterator[bytes]:
        yield b'{"messages": "'
        for _ in range(60):
            yield b"a" * 1000

    assert client.post(CHAT, content=pieces(), headers=JSON).status_code == 413


def test_a_body_that_does_not_arrive_is_given_up(server: LiveServer) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n"
    with connected(server) as connection:
        connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode())
        assert b" 408 " in connection.recv(1000)


def test_other_types_hosts_paths_and_methods_are_refused(client: httpx.Client) -> None:
    assert (
        client.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    )
    other_site = client.post(CHAT, json=LONG, headers={"host": "example.com"})
    assert (other_site.status_code, error_of(other_site)["code"]) == (403, "wrong_host")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/nothing", "/page", "/v1"])
def test_an_unknown_path_and_a_wrong_method_are_told_apart(client: httpx.Client, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = client.request(method, path, **({"json": {}} if method == "POST" else {}))
        assert answer.status_code == 404
        error_of(answer)
    for method, known in (("DELETE", CHAT), ("GET", CHAT), ("POST", "/health")):
        answer = client.request(method, known, **({"json": {}} if method == "POST" else {}))
        assert (answer.status_code, method in error_of(answer)["message"]) == (405, True)
        assert method not in answer.headers["allow"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "<|mask|>"}]}, "messages"),
        ("/v1/completions", {"prompt": "\ud800"}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        (CHAT, {"messages": MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"messages": MESSAGES, "temperature": -1}, "temperature"),
        (CHAT, {"messages": [MESSAGES[0] | {"mood": "good"}]}, "messages.0.mood"),
    ],
)  # fmt: skip
def test_an_error_has_the_name_of_its_field(
    client: httpx.Client, path: str, body: dict[str, object], param: str
) -> None:
    answer = client.post(path, content=json.dumps(body).encode(), headers=JSON)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


def connected(server: LiveServer) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def send(connection: socket.socket, body: dict[str, object]) -> None:
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"authorization: {KEY['authorization']}\r\n"
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)


def cancelled(server: LiveServer) -> float:
    """The number of requests that a client ended."""
    names = "coterie_requests_total", {"finish_reason": "cancelled"}
    return server.service.metrics.registry.get_sample_value(*names) or 0.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(slow: LiveServer, stream: bool) -> None:
    scheduler, engine = slow.service.scheduler, slow.service.engine
    before = cancelled(slow)
    with connected(slow) as connection:
        send(connection, LONG | {"stream": stream})
        wait_for(lambda: scheduler.num_running == 1)
        if stream:
            connection.recv(10)
    slow.wait_until_idle()
    assert engine.rows == ()
    assert cancelled(slow) == before + 1


def test_a_client_that_hangs_up_while_it_waits_takes_no_row(slow: LiveServer) -> None:
    scheduler, before = slow.service.scheduler, cancelled(slow)
    with connected(slow) as first, connected(slow) as second:
        send(first, LONG)
        wait_for(lambda: scheduler.num_running == 1)
        send(second, LONG)
        wait_for(lambda: scheduler.num_waiting == 1)
        second.close()
        wait_for(lambda: cancelled(slow) == before + 1)
        assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    slow.wait_until_idle()
    assert cancelled(slow) == before + 2


def test_a_reader_that_never_reads_stops_nobody(server: LiveServer, client: httpx.Client) -> None:
    with connected(server) as idle:
        send(idle, LONG | {"stream": True, "stream_options": {"coterie": True}})
        answer = client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 8})
        assert answer.status_code == 200
    server.wait_until_idle()


def test_log_lines_carry_the_id_and_no_prompt(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "coterie.server")
    headers = {"x-request-id": "mine-1"}
    body = {"messages": [{"role": "user", "content": "a private text"}], "max_tokens": 4}
    answer = client.post(CHAT, json=body, headers=headers)
    assert answer.headers["x-request-id"] == "mine-1"
    wait_for(lambda: any(record.message == "request" for record in caplog.records))
    line = next(record for record in caplog.records if record.message == "request")
    assert (line.request_id, line.fields["status"]) == ("mine-1", 200)
    assert not any("private" in str(vars(record)) for record in caplog.records)
    bad = client.post(CHAT, json=body, headers={"x-request-id": 'a"b\x7f' + "c" * 99})
    assert bad.headers["x-request-id"].isalnum()


def test_tokens_come_back_as_their_text(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"prompt": "naïve"}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 6
    text = client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "naïve"}
    turns = client.post("/tokenize", json={"messages": MESSAGES}).json()
    assert turns["count"] > len("Hello")
    for body in ({}, {"prompt": "a", "messages": MESSAGES}):
        assert client.post("/tokenize", json=body).status_code == 400
    assert client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_the_probes_and_the_metrics(client: httpx.Client) -> None:
    client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 8})
    assert client.get("/health").status_code == 200
    assert client.get("/ready").json()["ready"] is True
    assert set(client.get("/version").json()) == {"version"}
    lines = client.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    for name in ("denoising_steps", "canvas_positions", "committed_tokens"):
        assert float(values[f'vllm:diffusion_num_{name}_total{{model_name="embedded"}}']) > 0
    assert float(values["coterie_step_seconds_count"]) > 0
    assert float(values['coterie_unique_experts_total{layer="1"}']) > 0


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    """One row, one place in the queue, a key, and some policies."""
    allowed = AllowedOptions.parse(["des-vote:*", "unmask=sequential*"])
    settings = {"max_batch_size": 1, "max_queue": 1, "api_keys": ("x", "secret")}
    with live_server(byte_engine(0.01), allowed=allowed, **settings) as live:
        yield live


@pytest.mark.parametrize("value", [None, "Bearer wrong", "Bearer", "secret", "Basic secret"])
def test_a_key_is_needed(small: LiveServer, value: str | None) -> None:
    headers = {} if value is None else {"authorization": value}
    answer = ask(small, {"messages": MESSAGES}, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    assert status(small, "/health") == 200


@pytest.mark.parametrize(
    ("extra", "status"),
    [
        ({"policy": "des-vote:beta=0.3"}, 200),
        ({"policy": "vanilla"}, 200),  # the server's own
        ({"policy": "des-seq:k=2"}, 400),
        ({"unmask": "sequential:steps=2"}, 200),
        ({"unmask": "threshold:p=0.1"}, 400),
        ({"kv_cache": "uncached"}, 400),
        ({"block": 4}, 400),
    ],
)
def test_the_operator_says_what_a_request_may_set(
    small: LiveServer, extra: dict[str, object], status: int
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 4, **extra}
    answer = ask(small, body, headers=KEY)
    assert answer.status_code == status
    if status == 400:
        assert error_of(answer)["param"] in extra


def test_a_full_queue_refuses_and_says_when_to_try_again(small: LiveServer) -> None:
    stats = small.service.scheduler.stats
    with connected(small) as running, connected(small) as waiting:
        send(running, LONG)
        wait_for(lambda: stats() == {"running": 1, "waiting": 0})
        send(waiting, LONG)
        wait_for(lambda: stats() == {"running": 1, "waiting": 1})
        refused = ask(small, LONG, headers=KEY)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) > 0
        assert status(small, "/ready") == 503
        assert status(small, "/health") == 200
    small.wait_until_idle()


def test_time_runs_out_for_a_stream_and_for_what_waits() -> None:
    settings = {"max_batch_size": 1, "deadline": 2.0}
    with live_server(byte_engine(0.05), **settings) as server, ThreadPoolExecutor(2) as threads:
        stats = server.service.scheduler.stats
        streamed = threads.submit(ask, server, LONG | {"stream": True})
        wait_for(lambda: stats()["running"] == 1)
        whole = threads.submit(ask, server, LONG).result()
        assert (whole.status_code, error_of(whole)["type"]) == (504, "timeout_error")
        assert streamed.result().status_code == 200
        last = streamed.result().text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        server.wait_until_idle()


@pytest.mark.parametrize("failure", ["rows", "machine", "machine for good", "a fault"])
def test_a_failed_step_ends_only_what_it_must(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requests of a bad forward end with 500; a step that can be repeated is."""
    errors = {
        "rows": [NonFiniteLogitsError("not finite", (0,))],
        "machine": [OffloadError("the disk is slow")] * 2,
        "machine for good": [OffloadError("/srv/model.bin: the disk is gone")] * 9,
        "a fault": [KeyError("a fault of the program")],
    }[failure]
    engine = byte_engine()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: fail(errors) or step())
    with live_server(engine) as server:
        answer = ask(server, {"messages": MESSAGES, "max_tokens": 4})
        assert answer.status_code == (200 if failure == "machine" else 500)
        if failure != "machine":
            assert "/srv" not in error_of(answer)["message"]
        errors.clear()
        answer = ask(server, {"messages": MESSAGES, "max_tokens": 4})
        assert answer.status_code == 200
        assert engine.rows == ()


def fail(errors: list[Exception]) -> None:
    if errors:
        raise errors.pop(0)


def test_a_drained_server_finishes_what_runs_and_takes_no_more() -> None:
    engine, gate = byte_engine(), threading.Event()
    step = engine.step
    engine.step = lambda: (gate.wait(60), step())[1]
    body = {"messages": MESSAGES, "max_tokens": 20}
    with live_server(engine) as server, ThreadPoolExecutor(1) as threads:
        gate.set()
        expected = ask(server, body).json()
        gate.clear()
        running = threads.submit(ask, server, body)
        wait_for(lambda: server.service.scheduler.num_running == 1)
        server.signal()
        wait_for(lambda: status(server, "/ready") == 503)
        refused = ask(server, body)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
        gate.set()
        assert running.result().json()["choices"] == expected["choices"]
        wait_for(lambda: server.server.should_exit)


def test_a_drain_that_takes_too_long_gives_requests_up() -> None:
    with live_server(byte_engine(0.05), drain=0.1) as server, ThreadPoolExecutor(1) as threads:
        running = threads.submit(ask, server, LONG)
        wait_for(lambda: server.service.scheduler.num_running == 1)
        server.signal()
        answer = running.result()
        assert (answer.status_code, error_of(answer)["code"]) == (503, "shutting_down")


def test_a_second_signal_ends_a_drain() -> None:
    with live_server(byte_engine(0.05)) as server, connected(server) as running:
        send(running, LONG)
        wait_for(lambda: server.service.scheduler.num_running == 1)
        server.signal()
        assert not server.server.should_exit
        server.signal()
        wait_for(lambda: server.server.should_exit)
