"""The official client against the embedded model: whole, streamed, at once, and refused."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
import pytest
from live_server import LiveServer, embedded_model, live_server, wait_for
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from coterie.engine.engine import Engine
from coterie.server.pending_answer import FRAME_SECONDS

QUESTIONS = (
    "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?",
    "Ann has 7 bags of 2 apples and gives away 3. How many apples are left?",
    "Solve 3x + 4 = 19 for x.",
)
POLICIES = ("vanilla", "des-vote:beta=0.3")


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(Engine(embedded_model(), prefix_cache_bytes=1 << 24)) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as chosen:
        yield chosen


def turns(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def request(question: str, **extra: object) -> dict[str, Any]:
    fields: dict[str, Any] = {"max_tokens": 64, "messages": turns(question), "model": "embedded"}
    return fields | {"extra_body": extra}


@cache
def lone(question: str, policy: str) -> str:
    """The answer of an engine that serves nothing else."""
    return Engine(embedded_model()).generate(question, policy=policy, max_new_tokens=64).text


def chat(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**fields)


def complete(client: OpenAI, **fields: Any) -> Any:
    return client.completions.create(**fields)


def streamed(client: OpenAI, **fields: Any) -> str:
    chunks = chat(client, stream=True, **fields)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.mark.parametrize("policy", POLICIES)
def test_streamed_whole_and_lone_answers_are_one(client: OpenAI, policy: str) -> None:
    fields = request(QUESTIONS[0], policy=policy)
    whole = chat(client, **fields)
    assert whole.choices[0].message.content == lone(QUESTIONS[0], policy)
    assert streamed(client, **fields) == lone(QUESTIONS[0], policy)
    usage = whole.usage.model_dump()
    assert min(usage["forwards"], usage["expert_bytes"]) > 0
    assert (usage["expert_bytes_avoided"] > 0) == (policy != "vanilla")


def test_a_sampled_stream_is_the_sampled_whole(client: OpenAI) -> None:
    fields = request(QUESTIONS[1]) | {"temperature": 1.2, "top_p": 0.9, "seed": 7}
    whole = chat(client, **fields).choices[0].message.content
    assert streamed(client, **fields) == whole


def test_answers_at_once_are_those_alone(server: LiveServer) -> None:
    """Streams and wholes of several policies share forwards, and none is mixed up."""
    cases = [(q, p, s) for q in QUESTIONS for p in POLICIES for s in (False, True)]

    async def ask(client: AsyncOpenAI, question: str, policy: str, stream: bool) -> str:
        fields = request(question, policy=policy)
        answer = await client.chat.completions.create(stream=stream, **fields)
        if not stream:
            return answer.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, *case) for case in cases))

    answers = asyncio.run(ask_all())
    assert answers == [lone(question, policy) for question, policy, _ in cases]


def test_the_chunks_of_a_stream_are_openais(client: OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(chat(client, stream=True, stream_options=options, **request(QUESTIONS[0])))
    *parts, last, usage = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in parts] == [None] * len(parts)
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in [*parts, last])
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stop", [" pens in", "boxes. After", ["zzz", " = 12"], "Tom"])
def test_a_stop_string_ends_the_answer(client: OpenAI, stop: str | list[str]) -> None:
    text = lone(QUESTIONS[0], "vanilla")
    strings = [stop] if isinstance(stop, str) else stop
    cut = min(text.find(each) for each in strings if each in text)
    fields = request(QUESTIONS[0]) | {"stop": stop, "logprobs": True}
    answer = chat(client, **fields)
    choice = answer.choices[0]
    assert choice.message.content == text[:cut]
    assert streamed(client, **fields) == text[:cut]
    assert choice.finish_reason == "stop"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert "".join(token.token for token in choice.logprobs.content).startswith(text[:cut])


def test_logprobs_are_those_of_the_committed_tokens(client: OpenAI) -> None:
    fields = request(QUESTIONS[2], unmask="threshold:p=0.2") | {"logprobs": True}
    whole = chat(client, **fields)
    tokens = whole.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == whole.choices[0].message.content
    assert all(token.logprob <= 0 and math.isfinite(token.logprob) for token in tokens)
    chunks = chat(client, stream=True, **fields)
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [token for part in parts for token in part.content] == tokens


def test_completions_take_text_and_ids(client: OpenAI) -> None:
    ids = embedded_model().tokenizer.encode("Tom has", raw=True)
    fields: dict[str, Any] = {"model": "embedded", "max_tokens": 8, "logprobs": 0}
    answers = [
        complete(client, prompt=prompt, **fields) for prompt in ("Tom has", ["Tom has"], ids, [ids])
    ]
    texts = {answer.choices[0].text for answer in answers}
    assert len(texts) == 1
    logprobs = answers[0].choices[0].logprobs
    assert "".join(logprobs.tokens) == answers[0].choices[0].text
    stream = complete(client, prompt="Tom has", stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in stream) == texts.pop()


def test_an_answer_can_be_sent_back_as_a_turn(client: OpenAI) -> None:
    """As the documentation of the client does: with all keys that its objects have."""
    first = chat(client, **request(QUESTIONS[0])).choices[0].message
    later = request(QUESTIONS[2])
    answers = []
    for turn in (first, first.model_dump(), {"role": "assistant", "content": first.content}):
        later["messages"] = [*turns(QUESTIONS[0]), turn, *turns(QUESTIONS[2])]
        answers.append(chat(client, **later).choices)
    assert answers[0] == answers[1] == answers[2]


def test_a_benchmark_of_vllm_counts_what_was_sent(server: LiveServer) -> None:
    """The requests of ``vllm bench serve``, and how it reads the answers."""
    with httpx.Client(base_url=server.url, timeout=60) as plain:
        card = plain.get("/v1/models").json()["data"][0]
        assert card["root"] == card["id"]
        body = {
            "model": card["id"], "prompt": "Tom has", "repetition_penalty": 1.0, "max_tokens": 40,
            "logprobs": None, "stream": True, "stream_options": {"include_usage": True},
            "ignore_eos": True, "temperature": 0.0,
        }  # fmt: skip
        answer = plain.post("/v1/completions", json=body, headers={"x-request-id": "bench-0"})
    *events, done = answer.text.strip().split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert done == "data: [DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    assert [chunk["usage"] for chunk in chunks if not chunk["choices"]] == [chunks[-1]["usage"]]
    assert chunks[-1]["usage"]["completion_tokens"] == body["max_tokens"]


def test_a_system_turn_reaches_the_prompt(client: OpenAI) -> None:
    alone = chat(client, **request(QUESTIONS[0]) | {"max_tokens": 1})
    with_system = request(QUESTIONS[0]) | {"max_tokens": 1}
    for role in ("system", "developer"):
        with_system["messages"] = [{"role": role, "content": "Be short."}, *turns(QUESTIONS[0])]
        answer = chat(client, **with_system)
        assert answer.usage.prompt_tokens > alone.usage.prompt_tokens


def test_a_prompt_that_was_asked_before_is_not_computed_again(client: OpenAI) -> None:
    fields = request("Count: " + "one two three " * 20) | {"max_tokens": 4}
    first, second = (chat(client, **fields) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    assert second.choices == first.choices


UNSUPPORTED = {
    "n": 2,
    "logit_bias": {"5": 1},
    "response_format": {"type": "json_object"},
    "presence_penalty": 0.5,
    "top_logprobs": 3,
    "tools": [{"type": "function", "function": {"name": "look_up"}}],
    "beam_width": 4,
    "temperature": -1,
    "max_tokens": 0,
    "seed": 1.5,
    "policy": "no-such-policy",
    "kv_cache": "no-such-cache",
    "unmask": "threshold:q=1",
    "block": -1,
    "reuse_tolerance": 2,
    "skip_settled": 0,
    "stop": [""],
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_that_is_not_supported_is_refused_by_name(client: OpenAI, name: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        chat(client, **request(QUESTIONS[0], **{name: UNSUPPORTED[name]}))
    error = caught.value
    assert (error.param or "").startswith(name)
    assert error.type == "invalid_request_error"


def test_fields_that_change_nothing_are_taken(client: OpenAI) -> None:
    neutral = {
        "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "x",
        "response_format": {"type": "text"}, "top_logprobs": None, "tools": None, "stop": None,
    }  # fmt: skip
    answer = chat(client, **request(QUESTIONS[0], **neutral))
    assert answer.choices[0].message.content == lone(QUESTIONS[0], "vanilla")


@pytest.mark.parametrize(
    ("question", "limit", "param"),
    [
        ("a b " * 2000, "max_tokens", "messages"),
        ("a", "max_tokens", "max_tokens"),
        ("a", "max_completion_tokens", "max_completion_tokens"),
    ],
)
def test_what_is_too_long_is_refused_by_its_name(
    client: OpenAI, question: str, limit: str, param: str
) -> None:
    fields = request(question, **{limit: 4 if param == "messages" else 4000})
    fields.pop("max_tokens")
    with pytest.raises(BadRequestError) as caught:
        chat(client, **fields)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)
    assert param == "messages" or f"{limit}=4000" in caught.value.message


def test_only_the_served_model_is_known(client: OpenAI) -> None:
    card = client.models.list().data[0]
    assert card.id == "embedded"
    assert client.models.retrieve("embedded") == card
    with pytest.raises(NotFoundError):
        chat(client, **request(QUESTIONS[0]) | {"model": "gpt-4"})


def test_frames_say_what_the_stream_says(client: OpenAI) -> None:
    """Each denoising step is in a frame, once; their text is that of the deltas."""
    options = {"coterie": {"votes": True}}
    fields = request(QUESTIONS[0], policy=POLICIES[1], unmask="threshold:p=0.999")
    start = time.monotonic()
    chunks = list(chat(client, stream=True, stream_options=options, **fields))
    with_frame = [chunk for chunk in chunks if hasattr(chunk, "coterie")]
    assert len(with_frame) <= 1 + (time.monotonic() - start) / FRAME_SECONDS
    frames = [
        frame
        for chunk in chunks
        if (last := getattr(chunk, "coterie", None)) is not None
        for frame in (*last.get("earlier", ()), last)
    ]
    assert [frame["forward"] for frame in frames] == list(range(1, len(frames) + 1))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert "".join(frame["text"] for frame in frames) == text == streamed(client, **fields)
    assert all("votes" in frame for frame in frames if frame["kind"] == "decode")


def test_votes_are_recorded_only_while_they_are_watched(server: LiveServer, client: OpenAI) -> None:
    list(
        chat(
            client,
            stream=True,
            stream_options={"coterie": {"votes": True}},
            **request(QUESTIONS[0]),
        )
    )
    wait_for(lambda: server.service.scheduler._votes.is_idle)
