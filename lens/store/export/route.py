"""GET /api/v1/runs/{run}/export: a run as a file."""

from __future__ import annotations

import re
from itertools import chain
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from lens.store.export.exporter import Wanted
from lens.store.export.rows import Steps

router = APIRouter(prefix="/api/v1", tags=["read"])

AT_ONCE_BYTES = 4 << 20
"""What is smaller is answered in one piece: each further one is a turn of the event loop and of a thread."""
Bound = Annotated[int | None, Query(ge=-(2**62), le=2**62, description="A step")]


@router.get("/runs/{run}/export", summary="A run as Parquet, CSV, or a Perfetto trace (Chrome JSON, gzip)")
def export(
    request: Request,
    run: str,
    format: Literal["parquet", "csv", "arrow", "perfetto"] = "parquet",
    table: Literal["samples", "steps", "spans", "collectives", "vectors", "events", "all"] = "samples",
    start: Annotated[Bound, Query(alias="from")] = None,
    stop: Annotated[Bound, Query(alias="to")] = None,
    metric: Annotated[str | None, Query(description="Only this metric, of samples or vectors")] = None,
    compression: Annotated[
        Literal["lz4", "zstd"] | None, Query(description="Of the buffers of an Arrow stream")
    ] = None,
) -> Response:
    """One table; `table=all` gives a ZIP of all. A trace has them all anyway: one process a rank."""
    found = request.app.state.query.export(run, Wanted(format, table, Steps(start, stop), metric, compression))
    # Only what is safe in a header and a file name; the run's id may hold more.
    name = re.sub(r"[^\w.-]+", "_", found.name, flags=re.ASCII)
    headers = {"cache-control": "no-store", "content-disposition": f'attachment; filename="{name}"'}
    begun: list[bytes] = []
    for part in found.parts:
        begun.append(part)
        if sum(map(len, begun)) > AT_ONCE_BYTES:
            return StreamingResponse(chain(begun, found.parts), media_type=found.media_type, headers=headers)
    return Response(b"".join(begun), media_type=found.media_type, headers=headers)
