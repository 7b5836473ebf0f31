"""POST /v1/metrics (OTLP), POST /api/v1/write (Prometheus remote write), GET /metrics (to be scraped)."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import PlainTextResponse, Response

from lens.store.bodies import binary_schema, content_type_of, read_body
from lens.store.bridges import otlp, remote_write
from lens.store.bridges.exposition import CONTENT_TYPE, exposition
from lens.store.bridges.samples import Gathered
from lens.store.decode import NDJSON, decode
from lens.store.encodings import unpack
from lens.store.ingest import Batch, Ingest
from lens.store.projects import OtherProjectError, claimed, project_of
from lens.store.replies import HttpError

router = APIRouter(tags=["bridges"])

Run = Annotated[str | None, Query(max_length=128, description="The run for points that name none (lens.run)")]
_REMEMBERED = 4096


class Recent:
    """Digests of the bodies taken lately: a sender that did not get its answer sends the same body again."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def has(self, body: bytes) -> bool:
        """Whether it was taken."""
        return _digest(body) in self._seen

    def add(self, body: bytes) -> None:
        """Note that it was taken."""
        self._seen[_digest(body)] = None
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=16).digest()


@router.post(
    "/v1/metrics",
    summary="OTLP metrics, as protobuf or JSON; answered when they are on disk",
    openapi_extra=binary_schema(otlp.PROTOBUF, otlp.JSON),
)
async def take_otlp(request: Request, run: Run = None) -> Response:
    """Points go to the run named by the attribute lens.run, by ?run=, or by service.name; it is made if unknown."""
    content_type = content_type_of(request, (otlp.PROTOBUF, otlp.JSON))
    encoding = request.headers.get("content-encoding", "")

    def read(body: bytes, ingest: Ingest) -> Gathered:
        return otlp.gather(unpack(body, encoding, ingest.folder.limits.unpacked), content_type, run)

    gathered = await _take(request, read, run)
    return Response(otlp.reply(gathered, content_type), media_type=content_type)


@router.post(
    "/api/v1/write",
    status_code=204,
    summary="Prometheus remote write; answered when the samples are on disk",
    openapi_extra=binary_schema("application/x-protobuf"),
)
async def take_remote_write(request: Request, run: Run = None) -> Response:
    """Samples go to the run named by the label lens_run, by ?run=, or by job; it is made if unknown."""
    content_type_of(request, ("application/x-protobuf",))
    if "v2" in request.headers.get("content-type", ""):
        raise HttpError(415, "remote write 2.0 is not taken", "set protobuf_message: prometheus.WriteRequest")

    def read(body: bytes, ingest: Ingest) -> Gathered:
        return remote_write.gather(body, run, ingest.folder.limits.unpacked)

    gathered = await _take(request, read, run)
    if gathered.refused and not gathered.lines:
        raise HttpError(400, gathered.reason, "docs/bridges.md says what is taken")
    return Response(status_code=204)


@router.get("/metrics", summary="Newest values of live runs and the server's health, for Prometheus")
def scrape(request: Request, run: Run = None) -> Response:
    """Text; of one run with ?run=."""
    state = request.app.state
    text = exposition(state.folder, state.query, state.live, run, project_of(request.scope))
    return PlainTextResponse(text, headers={"cache-control": "no-store"}, media_type=CONTENT_TYPE)


async def _take(request: Request, read: Callable[[bytes, Ingest], Gathered], run: str | None) -> Gathered:
    ingest: Ingest = request.app.state.ingest
    recent: Recent = request.app.state.recent
    with ingest.place():
        parts = await read_body(request, ingest.folder.limits.body)
        project = project_of(request.scope)
        return await anyio.to_thread.run_sync(
            lambda: store_body(ingest, recent, b"".join(parts), read, project, run), limiter=ingest.workers
        )


def store_body(
    ingest: Ingest,
    recent: Recent,
    body: bytes,
    read: Callable[[bytes, Ingest], Gathered],
    project: str | None = None,
    asked: str | None = None,
) -> Gathered:
    """Keep what a reader finds in a body, unless the same bytes were taken lately. On disk when this returns.

    With a project, runs that are not of it are refused, and new ones are of it; `asked` is the run that the request names.

    Raises:
        StoreError: it cannot be read or kept.
    """
    # The same bytes for another run, or from another project, are something else.
    known = json.dumps([project, asked]).encode() + body
    if recent.has(known):
        return Gathered()
    gathered = read(body, ingest)
    for run, lines in gathered.lines.items():
        try:
            described = claimed(ingest.folder.registry, {"run": run}, project)
        except OtherProjectError as error:
            gathered.refuse(str(error), len(lines))
            continue
        if ingest.folder.registry.find(run) is None:
            ingest.folder.describe_run(described)
        records = b"\n".join(lines)
        receipt = ingest.keep(run, Batch(records, NDJSON, "", decode(records, NDJSON)))
        if receipt.rejected_count:
            gathered.refuse(receipt.rejected[0]["reason"], receipt.rejected_count)
    recent.add(known)
    return gathered
