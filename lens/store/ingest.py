"""How records come in: POST /api/v1/runs and POST /api/v1/runs/{run}/records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
import anyio.to_thread
import msgspec
from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from lens.store.bodies import binary_schema, content_type_of, json_schema, read_body
from lens.store.decode import CONTENT_TYPES, NDJSON, Decoded, decode
from lens.store.encodings import unpack
from lens.store.errors import UndecodableError, UnknownRunError
from lens.store.folder import DataFolder, Receipt
from lens.store.live import LiveFeed
from lens.store.projects import OtherProjectError, belongs, claimed, project_of
from lens.store.replies import HttpError, json_reply
from lens.store.runs import PROJECT_NAME, Run
from lens.store.verdicts import Verdicts
from lens.tables import Tables

router = APIRouter(prefix="/api/v1", tags=["ingest"])

WORKERS = 4
"""Batches decoded and written at the same time."""


@dataclass(frozen=True)
class Batch:
    """Records as they came, and what is in them."""

    body: bytes
    content_type: str
    encoding: str
    decoded: Decoded
    source: str | None = None
    sequence: int | None = None


class Ingest:
    """What ingest needs of the server."""

    def __init__(self, folder: DataFolder, live: LiveFeed, verdicts: Verdicts) -> None:
        self.folder, self.live, self.verdicts = folder, live, verdicts
        self.requests = 0
        self.workers = anyio.CapacityLimiter(WORKERS)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Room for one more request.

        Raises:
            HttpError: 429, there is none.
        """
        if self.requests >= self.folder.limits.requests:
            raise HttpError(429, "too many batches at the same time", "send the batch again in a moment")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    def keep(self, run: str, batch: Batch) -> Receipt:
        """Take a batch of a known run, and tell those who wait for news. Returns when it is on disk.

        Raises:
            StoreError: as `DataFolder.ingest`.
        """
        receipt = self.folder.ingest(
            run, batch.body, batch.content_type, batch.encoding, batch.decoded, batch.source, batch.sequence
        )
        if not receipt.duplicate:
            self.live.publish(run, batch.decoded.tables)
            if self._is_training(run, batch.decoded.tables):
                self.verdicts.mark(run)
        return receipt

    def _is_training(self, run: str, tables: Tables) -> bool:
        """Whether there is something to judge: numbers alone, such as a scraper sends, are no training."""
        numbers = tables.count("samples") + tables.count("vectors")
        progress = self.folder.registry.progress(self.folder.registry.run(run).number)
        return progress.last_step is not None or tables.total > numbers


_RUN_SCHEMA = json_schema(
    {
        "type": "object",
        "required": ["run"],
        "properties": {
            "run": {"type": "string", "minLength": 1, "maxLength": 128},
            "name": {"type": "string"},
            "project": {
                "type": "string",
                "pattern": f"^{PROJECT_NAME.pattern}$",
                "description": "Whose run it is, for tokens of one project; said once",
            },
            "world_size": {"type": "integer", "minimum": 1},
            "ranks": {"type": "array", "items": {"type": "object", "required": ["rank"]}},
            "groups": {"type": "object"},
            "experts": {"type": "object"},
            "config": {"type": "object"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "data_versions": {"type": "object"},
        },
    }
)


@router.post(
    "/runs", status_code=201, summary="Describe a run; merged with what is known of it", openapi_extra=_RUN_SCHEMA
)
async def describe_run(request: Request) -> Response:
    """201 for a new run, 200 for a known one; the reply is the run as it is known now."""
    ingest: Ingest = request.app.state.ingest
    content_type_of(request, ("application/json",))
    body = await read_body(request, ingest.folder.limits.body)
    try:
        described = msgspec.json.decode(b"".join(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UndecodableError(
            f"the body is not JSON: {error}", 'send {"run": "my-run", "world_size": 4}'
        ) from error
    project = project_of(request.scope)

    def describe() -> tuple[Run, bool]:
        known, is_new = ingest.folder.describe_run(claimed(ingest.folder.registry, described, project))
        if not belongs(known, project):
            raise OtherProjectError(known.id)  # somebody else's description came in between
        return known, is_new

    run, is_new = await anyio.to_thread.run_sync(describe, limiter=ingest.workers)
    return json_reply(run.described, 201 if is_new else 200)


@router.post(
    "/runs/{run}/records",
    summary="Send records; answered when they are on disk",
    openapi_extra=binary_schema(*CONTENT_TYPES),
)
async def take_records(
    request: Request,
    run: str,
    lens_source: Annotated[
        str | None, Header(description="Who sends; with the sequence it names the batch")
    ] = None,
    lens_sequence: Annotated[int | None, Header(ge=0, lt=2**63, description="Grows by one each batch")] = None,
) -> Response:
    """NDJSON, Arrow IPC stream or recorder slots; gzip or zstd. A batch sent again is stored once."""
    ingest: Ingest = request.app.state.ingest
    content_type = content_type_of(request, tuple(CONTENT_TYPES))
    if (lens_source is None) != (lens_sequence is None):
        raise HttpError(400, "Lens-Source and Lens-Sequence go together", "send both, or neither")
    if lens_source is not None and not 0 < len(lens_source) <= 256:
        raise HttpError(400, "Lens-Source: 1 to 256 characters", "use a name such as agent:host1:4711")
    limits = ingest.folder.limits
    with ingest.place():
        parts = await read_body(request, limits.body)
        encoding = request.headers.get("content-encoding", "")

        def take() -> dict[str, Any]:
            body = b"".join(parts)
            decoded = _decoded(ingest.folder, run, body, content_type, encoding)
            return _reply(
                ingest.keep(run, Batch(body, content_type, encoding, decoded, lens_source, lens_sequence))
            )

        return json_reply(await anyio.to_thread.run_sync(take, limiter=ingest.workers))


def _decoded(folder: DataFolder, run: str, body: bytes, content_type: str, encoding: str) -> Decoded:
    """The records of a body; the run must be known, or be described by a line of it."""
    known = folder.registry.find(run) is not None
    if not known and content_type != NDJSON:
        raise UnknownRunError(run)
    decoded = decode(unpack(body, encoding, folder.limits.unpacked), content_type)
    if not known and not any(described.get("run") == run for described in decoded.runs):
        # A file of records may describe its run in its first line; without that nobody knows the run.
        raise UnknownRunError(run)
    return decoded


def _reply(receipt: Receipt) -> dict[str, Any]:
    reply: dict[str, Any] = {"accepted": receipt.accepted, "rejected": receipt.rejected}
    if receipt.rejected_count > len(receipt.rejected):
        reply["rejected_count"] = receipt.rejected_count
    return reply
