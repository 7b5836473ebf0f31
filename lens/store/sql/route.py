"""POST /api/v1/query: SQL of users over the views."""

from __future__ import annotations

import anyio
import anyio.to_thread
import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from lens.store.bodies import content_type_of, json_schema, read_body
from lens.store.decode import ARROW
from lens.store.errors import BadQueryError
from lens.store.projects import project_of
from lens.store.replies import json_reply
from lens.store.sql.answer import arrow_of, reply_of
from lens.store.sql.guest import MOST_ROWS, SqlAnswer

router = APIRouter(prefix="/api/v1", tags=["read"])

MOST_BODY = 1 << 20
"""Bytes of a question."""


class Question(msgspec.Struct):
    """What is asked."""

    sql: str
    run: str | None = None
    limit: int = 10_000


_SCHEMA = json_schema(
    {
        "type": "object",
        "required": ["sql"],
        "properties": {
            "sql": {"type": "string", "description": "One SELECT over the views"},
            "run": {"type": ["string", "null"], "description": "Only this run's records"},
            "limit": {"type": "integer", "minimum": 1, "maximum": MOST_ROWS, "default": 10_000},
        },
    }
)


@router.post("/query", summary="One SELECT over lens's views of the records", openapi_extra=_SCHEMA)
async def query(request: Request) -> Response:
    """JSON rows, or an Arrow IPC stream where the Accept header asks for one (header Lens-Truncated)."""
    content_type_of(request, ("application/json",))
    body = b"".join(await read_body(request, MOST_BODY))
    try:
        question = msgspec.json.decode(body, type=Question)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadQueryError(
            f"the body is no question: {error}", 'send {"sql": "SELECT count() FROM steps"}'
        ) from error
    as_arrow = ARROW in request.headers.get("accept", "")

    def answer() -> Response:
        project = project_of(request.scope)
        found = request.app.state.query.sql(question.sql, question.run, question.limit, project)
        return _arrow_reply(found) if as_arrow else json_reply(reply_of(found))

    return await anyio.to_thread.run_sync(answer)


def _arrow_reply(found: SqlAnswer) -> Response:
    headers = {"cache-control": "no-store", "lens-truncated": str(found.truncated).lower()}
    return Response(arrow_of(found), media_type=ARROW, headers=headers)
