"""The OpenAPI document, and a fuzzer that follows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from live_server import LiveServer, byte_engine, live_server

if TYPE_CHECKING:
    from schemathesis import Case
    from schemathesis.schemas import APIOperation

EXAMPLES = 60  # of each operation
PATHS = {
    "/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/{name}",
    "/tokenize", "/detokenize", "/v1/chat/completions", "/v1/completions",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(byte_engine(), deadline=20.0) as live:
        yield live


def test_the_document_has_every_endpoint(server: LiveServer) -> None:
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    assert set(document["paths"]) == PATHS
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "stream", "policy", "stop", "max_completion_tokens"} <= fields.keys()


@pytest.mark.slow
def test_what_follows_the_document_finds_no_fault(server: LiveServer) -> None:
    """schemathesis: bodies that fit the schema, and bodies that do not."""
    import schemathesis  # here: it takes long to import

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for operation in schema.get_all_operations():
        check(operation.ok())


def check(operation: APIOperation) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def no_fault(case: Case) -> None:
        case.body = shortened(case.body)
        answer = case.call(timeout=60)
        assert answer.status_code < 500, answer.text
        assert "Traceback" not in answer.text

    no_fault()


def shortened(body: object) -> object:
    """The body with few new tokens, so that a valid one takes no time."""
    if not isinstance(body, dict) or not isinstance(body.get("max_tokens", 1), int):
        return body
    return body | {"max_tokens": min(body.get("max_tokens", 4), 4)}
