"""The store itself over HTTP: its size, its retention, compaction, and runs deleted."""

from __future__ import annotations

import anyio
import anyio.to_thread
import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from lens.store.access import HOLDER
from lens.store.bodies import content_type_of, json_schema, read_body
from lens.store.replies import json_reply
from lens.store.upkeep.keeper import Upkeep
from lens.store.upkeep.retention import LONGEST_S, BadRetentionError

router = APIRouter(prefix="/api/v1", tags=["store"])

MOST_BODY = 1 << 16


class Rule(msgspec.Struct):
    """How long to keep records of a run, or of all runs without a rule of their own."""

    keep_s: int | None = None
    run: str | None = None
    follow: bool = False


_SCHEMA = json_schema(
    {
        "type": "object",
        "properties": {
            "keep_s": {
                "type": ["integer", "null"],
                "minimum": 1,
                "maximum": LONGEST_S,
                "description": "Seconds; null is for ever",
            },
            "run": {"type": ["string", "null"], "description": "This run alone"},
            "follow": {"type": "boolean", "description": "The run has no rule of its own any more"},
        },
    }
)


@router.get("/store", summary="Rows and bytes of every table and run, schema, bytes a sample")
def info(request: Request) -> Response:
    """Sizes as of now; bytes of a run are its rows' share of each table."""
    return json_reply(_upkeep(request).info())


@router.get("/store/retention", summary="How long records are kept")
def show_retention(request: Request) -> Response:
    """{keep_s, runs: [{run, keep_s}]}: seconds, null for ever; the runs that have a rule of their own."""
    return json_reply(_upkeep(request).retention())


@router.put("/store/retention", summary="Keep records of all runs, or of one, for so long", openapi_extra=_SCHEMA)
async def set_retention(request: Request) -> Response:
    """What holds from now on. Records past it go within the hour, or with POST /api/v1/store/compact."""
    content_type_of(request, ("application/json",))
    body = b"".join(await read_body(request, MOST_BODY))
    try:
        rule = msgspec.json.decode(body, type=Rule)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRetentionError(f"the body is no rule: {error}", 'send {"keep_s": 2592000}') from error
    keeper, who = _upkeep(request), request.scope[HOLDER]
    said = await anyio.to_thread.run_sync(keeper.set_retention, rule.run, rule.keep_s, rule.follow, who)
    return json_reply(said)


@router.get("/store/compact", summary="How far the newest compaction is")
def compaction(request: Request) -> Response:
    """{status: idle, running, done or failed, began_ns, ended_ns, before, after, removed}."""
    return json_reply(_upkeep(request).compaction())


@router.post("/store/compact", status_code=202, summary="Delete what is past its time, merge parts")
def compact(request: Request) -> Response:
    """Begins in the background; GET says when it is done. One under way already goes on."""
    return json_reply(_upkeep(request).begin_compaction(request.scope[HOLDER]), 202)


@router.delete("/runs/{run}", summary="Delete a run with all its records, for good")
def delete_run(request: Request, run: str) -> Response:
    """{run, removed}: rows removed by table."""
    return json_reply(_upkeep(request).delete_run(run, request.scope[HOLDER]))


def _upkeep(request: Request) -> Upkeep:
    keeper: Upkeep = request.app.state.upkeep
    return keeper
