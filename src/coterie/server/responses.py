"""Answers as OpenAI's clients expect them: whole, and in chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from coterie.decoding import Token
from coterie.engine.events import Result
from coterie.server.answer import Delta, Step
from coterie.server.frames import step_frame
from coterie.server.ticket import Outcome

Json = dict[str, object]
DecodeToken = Callable[[int], str]
MIN_LOGPROB = -9999.0  # of a confidence of 0, as in OpenAI's API
DONE = b"data: [DONE]\n\n"


class ChatFormat:
    """``chat.completion`` and its chunks: their choices, without index and finish reason."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self) -> Json | None:
        """The choice before any text; None if there is none."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, delta: Delta, decode_token: DecodeToken, *, logprobs: bool) -> Json:
        content = _chat_logprobs(delta.tokens, decode_token) if logprobs else None
        return {"delta": {"content": delta.text}, "logprobs": content}

    def last(self) -> Json:
        return {"delta": {}, "logprobs": None}

    def whole(self, delta: Delta, decode_token: DecodeToken, *, logprobs: bool) -> Json:
        content = _chat_logprobs(delta.tokens, decode_token) if logprobs else None
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"message": message, "logprobs": content}


@dataclass  # not frozen: it counts the characters of a stream
class CompletionFormat:
    """``text_completion``, whole and in chunks; methods as those of ``ChatFormat``."""

    prefix = "cmpl"
    object = chunk_object = "text_completion"
    offset: int = 0

    def first(self) -> Json | None:
        return None

    def part(self, delta: Delta, decode_token: DecodeToken, *, logprobs: bool) -> Json:
        tokens = self._logprobs(delta.tokens, decode_token) if logprobs else None
        return {"text": delta.text, "logprobs": tokens}

    def last(self) -> Json:
        return {"text": "", "logprobs": None}

    whole = part

    def _logprobs(self, tokens: Sequence[Token], decode_token: DecodeToken) -> Json:
        texts, offsets = [decode_token(token.id) for token in tokens], []
        for text in texts:
            offsets.append(self.offset)
            self.offset += len(text)
        logprobs = [_logprob(token) for token in tokens]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return dict(zip(names, (texts, logprobs, None, offsets), strict=True))


AnswerFormat = ChatFormat | CompletionFormat


@dataclass(frozen=True)
class AnswerWriter:
    """Writes one answer: its id, model and time, and what was requested with it."""

    format: AnswerFormat
    id: str
    model: str
    created: int
    decode_token: DecodeToken
    expert_bytes: int
    logprobs: bool = False
    include_usage: bool = False

    def whole(self, delta: Delta, outcome: Outcome) -> Json:
        """The answer in one object."""
        choice = self.format.whole(delta, self.decode_token, logprobs=self.logprobs)
        choice |= {"index": 0, "finish_reason": outcome.finish_reason}
        head = {"id": self.id, "object": self.format.object}
        return {**head, **self._common(), "choices": [choice], "usage": usage(outcome)}

    def first_chunk(self) -> Iterator[bytes]:
        """The chunk with the role, where there is one."""
        if (choice := self.format.first()) is not None:
            yield self._chunk(choice)

    def chunk(self, delta: Delta) -> Iterator[bytes]:
        """The chunk of a delta, with its steps where they are wanted."""
        if delta.text or delta.tokens or delta.steps:
            choice = self.format.part(delta, self.decode_token, logprobs=self.logprobs)
            yield self._chunk(choice, coterie=self._frames(delta.steps))

    def last_chunks(self, outcome: Outcome) -> Iterator[bytes]:
        """The chunk with the finish reason, the usage where it is wanted, and the end."""
        yield self._chunk({**self.format.last(), "finish_reason": outcome.finish_reason})
        if self.include_usage:
            yield self._chunk(None, usage=usage(outcome))
        yield DONE

    def _frames(self, steps: Sequence[Step]) -> Json | None:
        """The frame of the last step; ``earlier`` has those since the last chunk."""
        if not steps:
            return None
        *earlier, last = [self._frame(step) for step in steps]
        return {**last, "earlier": earlier} if earlier else last

    def _frame(self, step: Step) -> Json:
        return step_frame(
            step.event,
            self.decode_token,
            step.votes,
            expert_bytes=self.expert_bytes,
            traffic=step.traffic,
            seconds=step.seconds,
        )

    def _chunk(
        self, choice: Json | None, *, coterie: Json | None = None, usage: Json | None = None
    ) -> bytes:
        choices = [] if choice is None else [{"index": 0, "finish_reason": None, **choice}]
        head = {"id": self.id, "object": self.format.chunk_object}
        chunk = {**head, **self._common(), "choices": choices}
        if self.include_usage:
            chunk["usage"] = usage
        if coterie is not None:
            chunk["coterie"] = coterie
        return sse(chunk)

    def _common(self) -> Json:
        return {"created": self.created, "model": self.model}


def sse(document: Json) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode()


def usage(outcome: Outcome) -> Json:
    """OpenAI's counts, and what the answer cost: forwards and bytes of experts."""
    result = outcome.result
    assert result is not None
    read, vanilla = total_bytes(result)
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": result.prompt_tokens + outcome.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
        "forwards": result.forwards,
        "expert_bytes": round(read),
        "expert_bytes_avoided": round(vanilla - read),
    }


def total_bytes(result: Result) -> tuple[float, float]:
    """Bytes of experts in all decode forwards and layers: used, and under vanilla routing."""
    count = result.experts.forwards * len(result.experts.per_layer)
    return result.expert_bytes * count, result.expert_bytes_vanilla * count


def _chat_logprobs(tokens: Sequence[Token], decode_token: DecodeToken) -> Json:
    entries = []
    for token in tokens:
        text = decode_token(token.id)
        logprob = {"token": text, "logprob": _logprob(token), "bytes": list(text.encode())}
        entries.append({**logprob, "top_logprobs": []})
    return {"content": entries, "refusal": None}


def _logprob(token: Token) -> float:
    """The logarithm of the confidence at which the token was committed."""
    return max(MIN_LOGPROB, math.log(token.confidence)) if token.confidence > 0 else MIN_LOGPROB
