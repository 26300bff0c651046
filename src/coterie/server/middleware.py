"""What every request passes: its id, its log line, limits of hosts, keys and bodies."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coterie.server.api_error import ApiError
from coterie.server.logs import FIELDS
from coterie.server.settings import ServerSettings

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}
PROTECTED = ("/v1/", "/tokenize", "/detokenize", "/openapi.json")
QUIET_PATHS = {"/health", "/ready", "/metrics"}
DISCARDED_BODIES, DISCARD_SECONDS = 8, 5.0  # of a body that is too large
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
LOG = logging.getLogger("coterie.server")


class RequestLog:
    """Gives each request an id, and writes one log line when its response has ended.

    An endpoint adds keys of that line to ``scope["state"]["log"]``.
    """

    def __init__(self, app: ASGIApp, *, on_response: Callable[[str, int], None]) -> None:
        self.app, self.on_response = app, on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= {"request_id": request_id, "log": {}}
        status, start = 500, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(SECURITY_HEADERS)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self._finish(scope, status, time.perf_counter() - start)

    def _finish(self, scope: Scope, status: int, seconds: float) -> None:
        path, state = scope["path"], scope["state"]
        route = getattr(scope.get("route"), "path", None) or "other"
        self.on_response(route, state["log"].get("status", status))
        fields = {"method": scope["method"], "path": path[:200], "status": status}
        fields |= {"seconds": round(seconds, 4), **state["log"]}
        level = logging.DEBUG if path in QUIET_PATHS and status < 400 else logging.INFO
        LOG.log(level, "request", extra={"request_id": state["request_id"], FIELDS: fields})


class AccessCheck:
    """Requires a key where there are keys, and a local host name where only those connect.

    The second keeps a web page of another site from reaching a server without a key.
    """

    def __init__(self, app: ASGIApp, *, settings: ServerSettings) -> None:
        self.app = app
        self.keys = [key.encode() for key in settings.api_keys]
        self.is_local = settings.is_loopback and not settings.api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._error(scope)) is not None:
            return await error.response()(scope, receive, send)
        return await self.app(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "localhost")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.is_local and name.lower() not in LOCAL_NAMES:
            return ApiError(
                403, "without a key, this server answers local host names only", code="wrong_host"
            )
        if not self.keys or not path.startswith(PROTECTED) or scope["method"] == "OPTIONS":
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode() if scheme.lower() == "bearer" else b""
        # Every key is compared, so that the time says nothing about which one is near.
        if sum(hmac.compare_digest(key, each) for each in self.keys):
            return None
        return ApiError(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


class BodyLimit:
    """Bounds the size of a body, and the time until it has arrived."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings) -> None:
        self.app, self.limit, self.seconds = app, settings.max_body_bytes, settings.body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (error := self._error(scope)) is not None:
            await self._discard(receive)
            return await error.response()(scope, receive, send)
        size, is_complete = 0, False

        async def limited() -> Message:
            nonlocal size, is_complete
            if is_complete:
                return await receive()
            try:
                async with asyncio.timeout(self.seconds):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body did not arrive", code="body_timeout") from None
            size += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if size > self.limit:
                if not is_complete:
                    await self._discard(receive)
                raise self._too_large()
            return message

        return await self.app(scope, limited, send)

    def _error(self, scope: Scope) -> ApiError | None:
        """What the headers alone say against a body."""
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self.limit:
            return self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            message = "the content type must be application/json"
            return ApiError(415, message, param="content-type")
        return None

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self.limit:,} bytes"
        return ApiError(413, message, code="body_too_large", headers={"connection": "close"})

    async def _discard(self, receive: Receive) -> None:
        """Reads what the client still sends, within limits: most read no answer before."""
        rest = DISCARDED_BODIES * self.limit
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while rest > 0 and (message := await receive()).get("more_body"):
                    rest -= len(message.get("body", b""))
