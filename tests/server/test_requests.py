"""What bodies may hold, and what chat templates get of them."""

from __future__ import annotations

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
