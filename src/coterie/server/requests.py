"""The bodies of requests: OpenAI's fields, and Coterie's own, which clients give as ``extra_body``.

A field is refused by name unless it is here. A field of ``NEUTRAL`` may have that one value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "bad_words": ([],),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_token_strs": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "priority": (0,),
    "verbosity": ("medium",),
    "annotations": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "reasoning_effort": ("none",),
    "continuous_usage_stats": (False,),
    "include_obfuscation": (False,),
    "parallel_tool_calls": (True, False),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
}
"""Fields of OpenAI's and vLLM's APIs, and the values at which they change nothing."""

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(strict=True, ge=0)]


class ApiModel(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def without_neutral(cls, values: object) -> object:
        """The values without those that change nothing; null never does."""
        if not isinstance(values, dict):
            return values
        return {
            name: value
            for name, value in values.items()
            if value is not None and (name in cls.model_fields or not _is_neutral(name, value))
        }


class CoterieStreamOptions(ApiModel):
    """What each chunk says about its step, beyond its text."""

    votes: Flag = False


class StreamOptions(ApiModel):
    """OpenAI's ``include_usage``; ``coterie`` adds provisional tokens, experts and bytes."""

    include_usage: Flag = False
    coterie: Flag | CoterieStreamOptions = False


class GenerationFields(ApiModel):
    """The fields that both ways of generating share."""

    prompt_field: ClassVar[str]
    model: str | None = None
    stream: Flag = False
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    # Labels of a client; the server ignores them.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    request_id: str | None = None
    # Coterie's own.
    ignore_eos: Flag = False
    early_stop: Literal["block", "token", "off"] | None = None
    policy: str | None = None
    kv_cache: Annotated[str | None, Field(validation_alias=AliasChoices("kv_cache", "plan"))] = None
    block: PositiveInt | None = None
    unmask: str | None = None
    commit_routing: Literal["vanilla", "policy"] | None = None
    prefill_routing: Literal["vanilla", "policy"] | None = None
    reuse_tolerance: Annotated[Number, Field(ge=0, lt=1)] | None = None
    skip_settled: PositiveInt | None = None

    @field_validator("stream_options")
    @classmethod
    def check_stream(cls, options: StreamOptions, info: ValidationInfo) -> StreamOptions:
        """Raises for ``stream_options`` without a stream."""
        if not info.data.get("stream", True):
            raise ValueError("only with stream=true")
        return options

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """The most new tokens; None if the request does not say."""
        return self.max_tokens

    @property
    def limit_field(self) -> str:
        """The field that gives ``limit``."""
        return "max_tokens"

    @property
    def wants_logprobs(self) -> bool:
        return False


class TextPart(ApiModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ToolCall(ApiModel):
    """A call of an assistant's turn; a template writes it into the prompt."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: dict[str, Any]


class ChatMessage(ApiModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)

    def to_turn(self) -> dict[str, object]:
        """The turn as chat templates read it."""
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, object] = {"role": role, "content": self.text}
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        named = {"name": self.name, "tool_call_id": self.tool_call_id}
        return turn | {name: value for name, value in named.items() if value is not None}


class Tool(ApiModel):
    """A function that the model may call."""

    type: Literal["function"]
    function: dict[str, Any]


class ChatRequest(GenerationFields):
    """The body of ``/v1/chat/completions``."""

    prompt_field = "messages"
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: PositiveInt | None = None
    logprobs: Flag = False
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] = "auto"

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def limit_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @property
    def turns(self) -> list[dict[str, object]]:
        return [message.to_turn() for message in self.messages]

    @property
    def tool_documents(self) -> list[dict[str, object]] | None:
        """The tools for the template; None without tools, or if none may be called."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump() for tool in self.tools]


TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """The body of ``/v1/completions``: one prompt, as text or token ids."""

    prompt_field = "prompt"
    prompt: str | TokenIds
    logprobs: Annotated[int, Field(strict=True, ge=0, le=1)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def one_prompt(cls, prompt: object) -> object:
        """The prompt outside a list of one; raises for several, and for none."""
        if prompt == []:
            raise ValueError("the prompt is empty")
        if not isinstance(prompt, list) or not isinstance(prompt[0], str | list):
            return prompt
        if len(prompt) > 1:
            raise ValueError("one prompt a request")
        return prompt[0]

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class TokenizeRequest(ApiModel):
    """The body of ``/tokenize``: a text as it is, or turns in the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None

    @model_validator(mode="after")
    def check_one_input(self) -> TokenizeRequest:
        """Raises unless there is exactly one of ``prompt`` and ``messages``."""
        if (self.prompt is None) == (not self.messages):
            raise ValueError("one of prompt and messages is needed")
        return self


class DetokenizeRequest(ApiModel):
    """The body of ``/detokenize``."""

    model: str | None = None
    tokens: list[TokenId]


def _is_neutral(name: str, value: object) -> bool:
    """Whether the value is one that changes nothing; True is not 1."""
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in NEUTRAL.get(name, ())
    )
