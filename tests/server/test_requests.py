"""What bodies may hold, and what chat templates get of them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from coterie.server.api_error import validation_error
from coterie.server.requests import NEUTRAL, ChatRequest, CompletionRequest
from coterie.server.settings import AllowedOptions

USER = {"role": "user", "content": "Hello"}
PAIRS = [(name, value) for name, values in NEUTRAL.items() for value in (*values, None)]
OPTION_NAMES = set(NEUTRAL) - set(ChatRequest.model_fields)


@pytest.mark.parametrize(("name", "value"), PAIRS)
def test_a_neutral_field_changes_nothing(name: str, value: object) -> None:
    assert ChatRequest(messages=[USER], **{name: value}) == ChatRequest(messages=[USER])


@pytest.mark.parametrize("name", sorted(OPTION_NAMES))
def test_another_value_of_a_neutral_field_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest(messages=[USER], **{name: "another"})
    located = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]
    error = validation_error(located)
    assert (error.status_code, error.param, error.code) == (400, name, "unsupported_field")
    assert all(json.dumps(value) in error.message for value in NEUTRAL[name])


BENCH = {"model": "embedded", "stream": True, "stream_options": {"include_usage": True}}
BODIES_OF_CLIENTS = {
    "vllm bench serve, completions": BENCH | {
        "prompt": "Hello", "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None,
        "ignore_eos": True, "temperature": 0.0, "top_p": 1.0, "min_p": 0.0,
    },
    "sglang.bench_serving": {
        "model": "embedded", "prompt": "Hello", "temperature": 0.0, "best_of": 1, "max_tokens": 8,
        "stream": True, "ignore_eos": True,
    },
    "vllm bench serve, chat": BENCH | {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        "max_completion_tokens": 8, "ignore_eos": True,
    },
    "langchain-openai": BENCH | {
        "messages": [USER, {"role": "assistant", "content": "Hi"}, USER], "n": 1,
        "temperature": 0.7, "parallel_tool_calls": False, "stop": None,
    },
    "litellm": {
        "model": "embedded", "messages": [USER], "user": "me", "metadata": {"tags": "a"},
        "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"},
        "max_retries": None, "functions": None, "tools": [], "prompt_cache_key": "a",
    },
}  # fmt: skip


@pytest.mark.parametrize("client", BODIES_OF_CLIENTS)
def test_bodies_of_other_clients_are_taken(client: str) -> None:
    body = BODIES_OF_CLIENTS[client]
    (CompletionRequest if "prompt" in body else ChatRequest).model_validate(body)


@given(st.text(st.characters(categories=["L"]), min_size=1))
def test_null_says_nothing(name: str) -> None:
    taken = {"messages", *ChatRequest.model_fields}
    if name not in taken:
        assert ChatRequest(messages=[USER], **{name: None}) == ChatRequest(messages=[USER])
    with pytest.raises(ValidationError, match="messages"):
        ChatRequest.model_validate({"messages": None, name: None})


@pytest.mark.parametrize("value", [True, 1.5, "1", 0, -1])
def test_a_number_of_tokens_is_a_whole_number_above_0(value: object) -> None:
    with pytest.raises(ValidationError):
        ChatRequest(messages=[USER], max_tokens=value)


def test_true_is_not_1() -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": [USER], "n": True})


def test_a_newer_name_of_a_limit_comes_first() -> None:
    assert ChatRequest(messages=[USER], max_tokens=3).limit == 3
    both = ChatRequest(messages=[USER], max_tokens=3, max_completion_tokens=5)
    assert both.limit == 5


def test_turns_are_those_of_chat_templates() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    request = ChatRequest(
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "7", "tool_call_id": "1"},
        ]
    )
    assert request.turns == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    ]


def test_tools_are_hidden_where_none_may_be_called() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert ChatRequest(messages=[USER], tools=tools).tool_documents == tools
    none = ChatRequest(messages=[USER], tools=tools, tool_choice="none")
    assert none.tool_documents is None


@given(st.text(min_size=1) | st.lists(st.integers(0, 99), min_size=1))
def test_a_prompt_may_stand_in_a_list_of_one(prompt: str | list[int]) -> None:
    assert CompletionRequest(prompt=[prompt]) == CompletionRequest(prompt=prompt)
    with pytest.raises(ValidationError, match="one prompt"):
        CompletionRequest(prompt=[prompt, prompt] if prompt != [] else [[], []])


@pytest.mark.parametrize(
    ("patterns", "option", "value", "allowed"),
    [
        ([], "policy", "anything", True),
        ([], "block", 7, True),
        (["des-vote:*"], "policy", "des-vote:beta=0.3", True),
        (["des-vote:*"], "policy", "des-seq:k=3", False),
        (["des-vote:*"], "block", 7, False),
        (["block=7"], "block", 7, True),
        (["block=7"], "policy", "vanilla", False),
        (["unmask=threshold*", "vanilla"], "unmask", "threshold:p=0.5", True),
        (["unmask=threshold*", "vanilla"], "policy", "vanilla", True),
        (["des-vote:beta=0.3"], "policy", "des-vote:beta=0.3", True),
    ],
)
def test_patterns_say_what_is_allowed(
    patterns: list[str], option: str, value: object, allowed: bool
) -> None:
    parsed = AllowedOptions.parse(patterns)
    assert parsed.allows(option, value) == allowed
    assert parsed.describe() == ", ".join(patterns)
