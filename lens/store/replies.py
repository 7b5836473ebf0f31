"""How answers and errors look on the wire: errors are always {"error", "hint"}."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lens.records import word
from lens.store.errors import (
    BadQueryError,
    FolderOwnedError,
    StoreBehindError,
    StoreError,
    StoreFullError,
    TooLargeError,
    UndecodableError,
    UnknownRunError,
    UnknownStepError,
)
from lens.store.projects import OtherProjectError
from lens.store.runs import BadRunError
from lens.store.upkeep.retention import BadRetentionError

logger = logging.getLogger(__name__)

_STATUSES: dict[type[StoreError], int] = {
    UnknownRunError: 404,
    UnknownStepError: 404,
    BadQueryError: 400,
    BadRunError: 400,
    OtherProjectError: 403,
    BadRetentionError: 400,
    UndecodableError: 400,
    TooLargeError: 413,
    StoreBehindError: 503,
    StoreFullError: 503,
    FolderOwnedError: 503,
}
_RETRY_AFTER_S = {429: "1", 503: "2"}


class HttpError(StoreError):
    """An error with a status of its own."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status = status


def json_reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer; numbers that are not finite must be words already (see `worded`)."""
    return Response(
        msgspec.json.encode(content),
        status,
        {"cache-control": "no-store", **(headers or {})},
        media_type="application/json",
    )


def worded(content: Any) -> Any:
    """The same content with NaN and infinities as words: JSON has no numbers for them."""
    if isinstance(content, float):
        return content if math.isfinite(content) else word(content)
    if isinstance(content, dict):
        return {key: worded(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [worded(value) for value in content]
    return content


def error_reply(status: int, error: str, hint: str, headers: dict[str, str] | None = None) -> Response:
    """An error, with Retry-After where trying again helps."""
    retry = {"retry-after": _RETRY_AFTER_S[status]} if status in _RETRY_AFTER_S else {}
    return json_reply({"error": error, "hint": hint}, status, {**retry, **(headers or {})})


def install_error_handlers(app: FastAPI) -> None:
    """Every error of the app as JSON."""
    app.add_exception_handler(StoreError, _store_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected)


def status_of(error: StoreError) -> int:
    """The status that an error is answered with."""
    return error.status if isinstance(error, HttpError) else _STATUSES.get(type(error), 500)


async def _store_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)
    status = status_of(error)
    if status == 500:
        logger.error("%s %s: %s", request.method, request.url.path, error)
    return error_reply(status, str(error), error.hint or "see the server's log")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase.lower()
    headers = dict(error.headers or {})
    return error_reply(
        error.status_code, f"{request.method} {request.url.path}: {phrase}", "see /openapi.json", headers
    )


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    return error_reply(422, f"{where}: {first['msg']}", "see /openapi.json for what is accepted")


async def _unexpected(request: Request, error: Exception) -> Response:
    # Starlette logs the traceback itself once this has answered.
    return error_reply(500, f"the server failed: {type(error).__name__}", "the server's log has the details")
