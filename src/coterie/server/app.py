"""The application: its endpoints, from a body to an answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

import coterie
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.model.weights import expert_bytes
from coterie.routing import POLICIES, format_policy
from coterie.server import api_error
from coterie.server.answer import Delta
from coterie.server.api_error import ApiError
from coterie.server.event_stream import EventStream, or_hang_up
from coterie.server.frames import model_summary
from coterie.server.generation_request import (
    GenerationRequest,
    make_generation_request,
    max_model_len,
)
from coterie.server.logs import FIELDS
from coterie.server.metrics import CONTENT_TYPE, ServerMetrics
from coterie.server.middleware import AccessCheck, BodyLimit, RequestLog
from coterie.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    TokenizeRequest,
)
from coterie.server.responses import AnswerFormat, AnswerWriter, ChatFormat, CompletionFormat, sse
from coterie.server.scheduler import Outcome, QueueFullError, Scheduler, Ticket
from coterie.server.settings import ServerSettings

STATIC = Path(__file__).with_name("static")
FRAME_SECONDS = 0.05  # between two chunks with frames
RETRY_AFTER = "1"  # seconds
LOG = logging.getLogger("coterie.server")
T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """What the endpoints share. Tokenizing runs in ``threads``: templates may take seconds."""

    engine: Engine
    settings: ServerSettings
    scheduler: Scheduler
    metrics: ServerMetrics
    created: int = field(default_factory=lambda: int(time.time()))
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tokenizer"))

    @staticmethod
    def of(engine: Engine, settings: ServerSettings) -> Service:
        metrics = ServerMetrics(engine, settings.model_name)
        scheduler = Scheduler(engine, settings, metrics)
        metrics.watch_queue(lambda: scheduler.num_running, lambda: scheduler.num_waiting)
        return Service(engine, settings, scheduler, metrics)

    async def in_thread(self, call: Callable[[], T]) -> T:
        """What the call returns; an error of the package is the client's."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, call)
        except CoterieError as error:
            raise ApiError(400, str(error)) from None

    def check_model(self, name: str | None) -> None:
        """Raises for a model that is not the one served."""
        if name not in (None, self.settings.model_name):
            served = self.settings.model_name
            raise ApiError(
                404, f"{name!r} is not served here; {served!r} is", param="model",
                code="model_not_found",
            )  # fmt: skip

    def submit(self, request: GenerationRequest) -> Ticket:
        try:
            return self.scheduler.submit(request)
        except QueueFullError:
            raise ApiError(
                429, "too many requests wait; try again later", code="queue_full",
                headers={"retry-after": RETRY_AFTER},
            ) from None  # fmt: skip


def make_app(service: Service) -> ASGIApp:
    """The application with all it passes through before its endpoints."""
    app = FastAPI(
        title="Coterie", version=coterie.__version__, docs_url=None, redoc_url=None,
        exception_handlers={
            ApiError: api_error.on_api_error,
            HTTPException: api_error.on_http_error,
            RequestValidationError: api_error.on_invalid,
            Exception: api_error.on_unexpected,
        },
    )  # fmt: skip
    app.state.service = service
    _add_probes(app, service)
    _add_model_endpoints(app, service)
    _add_generation(app, service)
    if STATIC.is_dir():
        app.mount("/", StaticFiles(directory=STATIC, html=True))
    limited = BodyLimit(app, settings=service.settings)
    checked = AccessCheck(limited, settings=service.settings)
    return RequestLog(checked, on_response=service.metrics.on_response)


def _add_probes(app: FastAPI, service: Service) -> None:
    scheduler = service.scheduler

    @app.get("/health")
    async def health() -> Response:
        """Whether the engine's thread runs."""
        return Response(status_code=200 if scheduler.is_alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether a request would be taken now."""
        document = {"ready": scheduler.is_ready, **scheduler.stats()}
        return JSONResponse(document, 200 if scheduler.is_ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of the server."""
        return {"version": coterie.__version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)


def _add_model_endpoints(app: FastAPI, service: Service) -> None:
    tokenizer = service.engine.model.tokenizer

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        service.check_model(name)
        return _model_card(service)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a text, or of turns in the chat template."""
        service.check_model(body.model)
        turns, text = [turn.to_turn() for turn in body.messages or ()], body.prompt
        ids = await service.in_thread(
            lambda: (
                tokenizer.encode_chat(turns) if text is None else tokenizer.encode(text, raw=True)
            )
        )
        longest = max_model_len(service.engine, service.settings)
        return {"count": len(ids), "max_model_len": longest, "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of token ids, without special tokens."""
        service.check_model(body.model)
        vocabulary = service.engine.model.spec.vocabulary
        if unknown := [token for token in body.tokens if token >= vocabulary]:
            message = f"{unknown[0]} is not a token id below {vocabulary}"
            raise ApiError(400, message, param="tokens")
        return {"prompt": await service.in_thread(lambda: tokenizer.decode(body.tokens))}


def _add_generation(app: FastAPI, service: Service) -> None:
    tokenizer = service.engine.model.tokenizer

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        """The model's next turn."""
        service.check_model(body.model)
        ids = await service.in_thread(
            lambda: tokenizer.encode_chat(body.turns, body.tool_documents)
        )
        return await _answer(service, http, body, ids, ChatFormat())

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """The continuation of a text."""
        service.check_model(body.model)
        prompt, ids = body.prompt, body.prompt
        if isinstance(prompt, str):
            ids = await service.in_thread(lambda: tokenizer.encode(prompt, raw=True))
        assert isinstance(ids, list)
        return await _answer(service, http, body, ids, CompletionFormat())


async def _answer(
    service: Service,
    http: Request,
    body: GenerationFields,
    ids: list[int],
    answer_format: AnswerFormat,
) -> Response:
    """The answer, whole or as a stream; a client that hangs up frees its row."""
    request_id = http.state.request_id
    request = await service.in_thread(
        lambda: make_generation_request(
            body, ids, service.engine, service.settings, request_id=request_id
        )
    )
    _log_request(http, service.settings, body, request)
    ticket = service.submit(request)
    stream_options = body.stream_options
    writer = AnswerWriter(
        answer_format,
        id=f"{answer_format.prefix}-{request_id}",
        model=service.settings.model_name,
        created=int(time.time()),
        decode_token=service.engine.model.tokenizer.decode_token,
        expert_bytes=expert_bytes(
            service.engine.model.spec, service.engine.model.transformer.dtype
        ),
        logprobs=request.logprobs,
        include_usage=stream_options is not None and stream_options.include_usage,
    )
    answer = _Answer(service, ticket, http.state.log)
    try:
        if not body.stream:
            delta, outcome = await or_hang_up(answer.whole(), http.receive)
            return JSONResponse(writer.whole(delta, outcome))
        # The status of a stream is known once its first part is there.
        first = await or_hang_up(answer.receive(), http.receive)
    except BaseException:
        service.scheduler.cancel(ticket)
        raise
    return EventStream(
        _chunks(answer, first, writer),
        on_close=lambda: service.scheduler.cancel(ticket),
        seconds=answer.seconds_left + service.settings.body_seconds,
    )


@dataclass(frozen=True)
class _Answer:
    """The parts of an answer until its deadline; failures are raised as ApiError."""

    service: Service
    ticket: Ticket
    log: dict[str, object]

    @property
    def seconds_left(self) -> float:
        arrival = self.ticket.request.arrival
        return max(0.0, arrival + self.service.settings.deadline - time.monotonic())

    async def receive(self) -> tuple[Delta, Outcome | None]:
        """The next part, and the outcome at the end."""
        try:
            async with asyncio.timeout(self.seconds_left):
                delta, outcome = await self.ticket.receive()
        except TimeoutError:
            self.service.scheduler.cancel(self.ticket)
            seconds = self.service.settings.deadline
            message = f"no answer within {seconds:g} s"
            raise ApiError(504, message, code="deadline_exceeded") from None
        if outcome is not None:
            if outcome.error is not None:
                raise outcome.error
            self._log(outcome)
        return delta, outcome

    async def whole(self) -> tuple[Delta, Outcome]:
        """All parts as one."""
        delta, outcome = await self.receive()
        while outcome is None:
            part, outcome = await self.receive()
            delta = delta.joined(part)
        return delta, outcome

    def _log(self, outcome: Outcome) -> None:
        ticket, result = self.ticket, outcome.result
        assert result is not None
        self.log.update(
            finish_reason=outcome.finish_reason,
            prompt_tokens=result.prompt_tokens,
            completion_tokens=outcome.completion_tokens,
            forwards=result.forwards,
            queue_seconds=round((ticket.started or ticket.submitted) - ticket.submitted, 4),
        )


async def _chunks(
    answer: _Answer, first: tuple[Delta, Outcome | None], writer: AnswerWriter
) -> AsyncIterator[bytes]:
    """The events of a stream; an error after its start is an event too."""
    pause = FRAME_SECONDS if answer.ticket.request.steps else 0.0
    delta, outcome = first
    for chunk in writer.first_chunk():
        yield chunk
    try:
        while True:
            for chunk in writer.chunk(delta):
                yield chunk
            if outcome is not None:
                break
            await asyncio.sleep(pause)
            delta, outcome = await answer.receive()
    except ApiError as error:
        answer.log.update(status=error.status_code, error=error.message)
        yield sse(error.document())
        return
    for chunk in writer.last_chunks(outcome):
        yield chunk


def _log_request(
    http: Request, settings: ServerSettings, body: GenerationFields, request: GenerationRequest
) -> None:
    log: dict[str, object] = http.state.log
    log.update(stream=body.stream, policy=body.policy, prompt_tokens=len(request.prompt_ids))
    if settings.log_prompts:
        document = body.model_dump(include={"messages", "prompt"}, exclude_none=True)
        extra = {"request_id": request.id, FIELDS: document}
        LOG.info("prompt", extra=extra)


def _model_card(service: Service) -> dict[str, object]:
    """OpenAI's keys, vLLM's ``max_model_len``, and under ``coterie`` what frames need."""
    engine, settings = service.engine, service.settings
    policy = engine.policy
    card: dict[str, object] = {
        "id": settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "coterie",
        "max_model_len": max_model_len(engine, settings),
    }
    summary = {
        **model_summary(engine.model),
        "policy": format_policy(policy) if type(policy) in POLICIES.values() else repr(policy),
        "policies": sorted(POLICIES),
        "generation": engine.generation.document(),
        "allowed": settings.allowed.describe() or "*",
    }
    return {**card, "coterie": summary}
