"""Reads request bodies: their content type, their parts, and how OpenAPI describes them."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from lens.store.replies import HttpError

MOST_DRAINED = 1 << 30
"""Bytes of a body over the limit that are still read, so that the sender gets the answer and not a reset."""


def content_type_of(request: Request, accepted: tuple[str, ...]) -> str:
    """The request's content type.

    Raises:
        HttpError: 415, it is none of those accepted.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given not in accepted:
        raise HttpError(415, f"content type {given or 'missing'!r} is not taken here", f"use {', '.join(accepted)}")
    return given


async def read_body(request: Request, limit: int) -> list[bytes]:
    """The parts of the request's body: joining many megabytes is nothing for the event loop.

    Raises:
        HttpError: 413, it is over the limit; 400, the sender went away.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > MOST_DRAINED:
                break
            else:
                parts.clear()
    except ClientDisconnect as error:
        raise HttpError(400, "the body was cut short", "send it again") from error
    if size > limit:
        raise HttpError(413, f"the body is larger than {limit >> 20} MiB", "send it in smaller batches")
    return parts


def json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """What OpenAPI says of a JSON body that a route reads itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def binary_schema(*content_types: str) -> dict[str, Any]:
    """What OpenAPI says of a body of bytes, of any of these types."""
    content = {each: {"schema": {"type": "string", "format": "binary"}} for each in content_types}
    return {"requestBody": {"required": True, "content": content}}
