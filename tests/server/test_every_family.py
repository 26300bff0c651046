"""Each family behind the server: a stream is the whole answer, and that of the engine."""

from __future__ import annotations

import httpx
import pytest
from live_server import live_server, text_of
from tiny_models import family_generation, tiny_model

from coterie.engine.engine import Engine
from coterie.testing import FAMILY_CONFIGS

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
@pytest.mark.parametrize(
    "policy", [pytest.param("vanilla", marks=pytest.mark.slow), "des-vote:beta=0.4"]
)
def test_a_stream_is_the_answer_of_the_engine(family: str, policy: str) -> None:
    generation = family_generation(family).replace(max_new_tokens=16)
    engine = Engine(tiny_model(family), generation=generation)
    messages = [{"role": "user", "content": "5 17 33 2 9"}]
    ids = engine.model.tokenizer.encode_chat(messages)
    expected = engine.generate(ids, policy=policy, seed=3).text
    body = {"messages": messages, "policy": policy, "seed": 3}
    with live_server(engine) as server:
        whole, streamed = (
            httpx.post(f"{server.url}{CHAT}", json=body | {"stream": stream}, timeout=120)
            for stream in (False, True)
        )
    assert whole.status_code == 200, whole.text
    assert whole.json()["choices"][0]["message"]["content"] == expected
    assert text_of(streamed.text) == expected
