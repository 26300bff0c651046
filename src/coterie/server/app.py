"""The application: its endpoints, from a body to an answer."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

import coterie
from coterie.model.weights import expert_bytes
from coterie.routing import POLICIES, format_policy
from coterie.server import api_error
from coterie.server.api_error import ApiError
from coterie.server.event_stream import EventStream, or_hang_up
from coterie.server.frames import model_summary
from coterie.server.generation_request import (
    GenerationRequest,
    make_generation_request,
    max_model_len,
)
from coterie.server.logs import FIELDS
from coterie.server.metrics import CONTENT_TYPE
from coterie.server.middleware import AccessCheck, BodyLimit, RequestLog
from coterie.server.pending_answer import PendingAnswer, answer_events
from coterie.server.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationFields,
    TokenizeRequest,
)
from coterie.server.responses import AnswerFormat, AnswerWriter, ChatFormat, CompletionFormat
from coterie.server.service import Service
from coterie.server.settings import ServerSettings

STATIC = Path(__file__).with_name("static")
LOG = logging.getLogger("coterie.server")


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
    _add_probes(app, service)
    _add_model_endpoints(app, service)
    _add_generation(app, service)
    _add_page(app)
    limited = BodyLimit(app, settings=service.settings)
    checked = AccessCheck(limited, settings=service.settings)
    return RequestLog(checked, on_response=service.metrics.on_response)


def _add_page(app: FastAPI) -> None:
    """One route for each file: a mount at the root would answer for unknown endpoints too."""
    files = StaticFiles(directory=STATIC)

    async def send_file(request: Request) -> Response:
        name = request.url.path.removeprefix("/") or "index.html"
        return await files.get_response(name, request.scope)

    for name in ("", *(path.name for path in STATIC.iterdir())):
        app.add_route(f"/{name}", send_file, include_in_schema=False)


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
            ),
            param="messages" if text is None else "prompt",
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
            lambda: tokenizer.encode_chat(body.turns, body.tool_documents),
            param="tools" if body.tool_documents else "messages",
        )
        return await _answer(service, http, body, ids, ChatFormat())

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        """The continuation of a text."""
        service.check_model(body.model)
        prompt, ids = body.prompt, body.prompt
        if isinstance(prompt, str):
            ids = await service.in_thread(
                lambda: tokenizer.encode(prompt, raw=True), param="prompt"
            )
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
    writer = _writer(service, body, request, answer_format)
    answer = PendingAnswer(service, ticket, http.state.log)
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
        answer_events(answer, first, writer),
        on_close=lambda: service.scheduler.cancel(ticket),
        seconds=answer.seconds_left + service.settings.body_seconds,
    )


def _writer(
    service: Service,
    body: GenerationFields,
    request: GenerationRequest,
    answer_format: AnswerFormat,
) -> AnswerWriter:
    model, options = service.engine.model, body.stream_options
    return AnswerWriter(
        answer_format,
        id=f"{answer_format.prefix}-{request.id}",
        model=service.settings.model_name,
        created=int(time.time()),
        decode_token=model.tokenizer.decode_token,
        expert_bytes=expert_bytes(model.spec, model.transformer.dtype),
        logprobs=request.logprobs,
        include_usage=options is not None and options.include_usage,
    )


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
    """The keys of OpenAI and of vLLM, and under ``coterie`` what frames need."""
    engine, settings = service.engine, service.settings
    policy = engine.policy
    card: dict[str, object] = {
        "id": settings.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "coterie",
        "root": settings.model_name,
        "parent": None,
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
