"""Errors as clients of OpenAI's API expect them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from coterie.errors import MESSAGE_CHARACTERS, clip, printable
from coterie.server.requests import NEUTRAL

INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"
TYPES = {429: "rate_limit_error", 504: "timeout_error"}
FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/:'\"]+/)+")
"""Where the server keeps its files is no client's business; the name of a file may help it."""
UNION_BRANCHES = {"str", "bool", "int"}


class ApiError(HTTPException):
    """A status and what the client is given: a message, the field at fault, a code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    def document(self) -> dict[str, object]:
        """``{"error": {"message", "type", "param", "code"}}``."""
        kind = INVALID_REQUEST if self.status_code < 500 else SERVER_ERROR
        error = {
            "message": printable(clip(FOLDERS.sub("", self.message), MESSAGE_CHARACTERS)),
            "type": TYPES.get(self.status_code, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        # In ASCII: a message may quote what is no valid UTF-8.
        return Response(
            json.dumps(self.document()),
            self.status_code,
            headers=self.headers,
            media_type="application/json",
        )


def internal_error() -> ApiError:
    """An error with its cause in the server's log only."""
    return ApiError(500, "the server failed; its log has the cause", code="internal_error")


async def on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    # FastAPI raises 400 for a body that is no UTF-8, or nested too deeply.
    if error.status_code == 400:
        return bad_json().response()
    texts = {
        404: "nothing is served at this path; /openapi.json lists what is",
        405: f"this path does not take {request.method}",
    }
    message = texts.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response()


async def on_unexpected(_: Request, error: Exception) -> Response:
    return internal_error().response()


def bad_json() -> ApiError:
    return ApiError(400, "the body is not valid JSON in UTF-8", code="json_invalid")


def validation_error(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The problem that pydantic found deepest in the body, by the name of the field."""
    problem = max(problems, key=lambda problem: len(problem["loc"]))
    # The first part is "body"; names of types and of pydantic's functions are no fields.
    parts = [str(part) for part in problem["loc"][1:]]
    fields = [part for part in parts if part.isidentifier() or part.isdigit()]
    param = ".".join(part for part in fields if part not in UNION_BRANCHES) or None
    if problem["type"] == "json_invalid":
        return bad_json()
    if problem["type"] == "extra_forbidden":
        values = [json.dumps(value) for value in NEUTRAL.get(parts[-1], ())]
        message = f"{param} is not supported" + f", except {' or '.join(values)}" * bool(values)
        return ApiError(400, message, param=param, code="unsupported_field")
    if not parts and problem["type"] != "value_error":
        return ApiError(400, "the body must be a JSON object", code="json_invalid")
    message = str(problem["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param)
