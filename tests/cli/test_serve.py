"""``coterie serve``: from options to an engine and its settings."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from coterie.cli import engine_options
from coterie.cli.entry import run
from coterie.engine.engine import Engine
from coterie.errors import ConfigError
from coterie.server import http_server
from coterie.server.settings import ServerSettings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Engine, ServerSettings]]:
    """What would be served, after the server said that it accepts connections."""
    calls: list[tuple[Engine, ServerSettings]] = []

    def serve(
        engine: Engine,
        settings: ServerSettings,
        listener: socket.socket,
        on_start: Callable[[int], None],
    ) -> None:
        calls.append((engine, settings))
        on_start(settings.port or 5000)

    monkeypatch.setattr(http_server, "serve", serve)
    monkeypatch.setattr(http_server, "bind", lambda settings: socket.socket())
    monkeypatch.delenv("COTERIE_API_KEY", raising=False)
    return calls


def test_the_first_words_are_a_page_and_a_request(
    served: list[tuple[Engine, ServerSettings]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve"]) == 0
    ((engine, settings),) = served
    assert settings.model_name == engine.model.name == "embedded"
    assert settings.is_loopback
    assert not settings.api_keys
    notes = capsys.readouterr().err
    for word in ("http://127.0.0.1:8000/ ", "curl http://127.0.0.1:8000/v1/chat/completions"):
        assert word.strip() in notes
    assert "--api-key" not in notes


def test_a_server_for_other_machines_warns_without_a_key(
    served: list[tuple[Engine, ServerSettings]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(["serve", "--host", "0.0.0.0"])
    assert "--api-key" in capsys.readouterr().err
    monkeypatch.setenv("COTERIE_API_KEY", "from the environment")
    run(["serve", "--host", "0.0.0.0"])
    run(["serve", "--host", "0.0.0.0", "--api-key", "a", "--api-key", "b"])
    notes = capsys.readouterr().err
    assert "--api-key" not in notes
    assert "from the environment" not in notes
    keys = [settings.api_keys for _, settings in served]
    assert keys == [(), ("from the environment",), ("a", "b")]


def test_options_reach_the_engine_and_the_limits(
    served: list[tuple[Engine, ServerSettings]],
) -> None:
    options = "--policy des-vote:beta=0.3,scope=batch -n 40 --unmask threshold:p=0.7 "
    options += "--max-batch-size 3 --max-queue 4 --deadline 9 --max-body 1MiB --drain 2 "
    options += "--max-model-len 100 --allow-policy des-seq:* --allow-policy block=* --log-prompts "
    options += "--served-model-name small --prefix-cache 0"
    assert run(["serve", "embedded", *options.split()]) == 0
    ((engine, settings),) = served
    assert engine.policy.election.scope == "batch"
    assert (engine.generation.max_new_tokens, engine.generation.unmask) == (40, "threshold:p=0.7")
    assert (settings.max_batch_size, settings.max_queue, settings.deadline) == (3, 4, 9)
    assert (settings.max_body_bytes, settings.drain, settings.max_model_len) == (1 << 20, 2, 100)
    assert settings.allowed.patterns == (("policy", "des-seq:*"), ("block", "*"))
    assert (settings.model_name, settings.log_prompts) == ("small", True)


def test_auto_serves_what_the_plan_chose(
    served: list[tuple[Engine, ServerSettings]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(options: engine_options.EngineOptions, policy: str) -> object:
        assert policy == "des-vote:beta=0.3"
        return replace(options, simulate_expert_memory="50%")

    monkeypatch.setattr(engine_options, "planned_options", planned)
    assert run(["serve", "--auto", "--policy", "des-vote:beta=0.3"]) == 0
    ((engine, _),) = served
    assert engine.model.store.traffic_log is not None


def test_a_port_in_use_is_reported_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bind(settings: ServerSettings) -> socket.socket:
        raise ConfigError("the port is in use")

    monkeypatch.setattr(http_server, "bind", bind)
    monkeypatch.setattr(engine_options.EngineOptions, "open", lambda _: pytest.fail("loaded"))
    assert run(["serve"]) == 2
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--port", "70000"], "--port"),
        (["--deadline", "0"], "--deadline"),
        (["--max-body", "much"], "--max-body"),
        (["--prefix-cache", "-1"], "--prefix-cache"),
        (["--api-key", "ü"], "--api-key"),
        (["--policy", "nope"], "nope"),
        (["one", "--model", "two"], "--model"),
        (["no-such-folder"], "no-such-folder"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(
    served: list[tuple[Engine, ServerSettings]],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    word: str,
) -> None:
    assert run(["serve", *options]) == 2
    assert word in capsys.readouterr().err
    assert not served
