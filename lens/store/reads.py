"""How runs are read: every GET under /api/v1. Plain functions: FastAPI runs them in threads, off the event loop."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from lens.store import query as reading
from lens.store.charts import MOST_CELLS
from lens.store.errors import BadQueryError
from lens.store.grids import Window
from lens.store.projects import project_of
from lens.store.relations import Selection
from lens.store.replies import json_reply, worded

router = APIRouter(prefix="/api/v1", tags=["read"])

Step = Annotated[int, Query(ge=-(2**62), le=2**62)]
Metric = Annotated[str, Query(description="A metric of the catalogue, a user's own, step.duration, phase.duration")]
Metrics = Annotated[str, Query(description="A metric, or several with commas between them")]
Ranks = Annotated[str | None, Query(description="Ranks, such as 3 or 0,1,5; all without it")]
Bound = Annotated[int | None, Query(ge=1 - 2**62, le=2**62 - 1, description="A step, or Unix ns on the time axis")]


@router.get("/runs", summary="Every run, newest first")
def list_runs(request: Request) -> Response:
    """{"runs": […]}."""
    return json_reply({"runs": _query(request).runs(project_of(request.scope))})


@router.get("/runs/{run}", summary="One run: topology, last step, data age, ranks reporting, drops")
def show_run(request: Request, run: str) -> Response:
    """The run."""
    return json_reply(worded(_query(request).run(run)))


@router.get("/runs/{run}/now", summary="What each rank is doing: pace, waiting, phase, collective, card")
def now(request: Request, run: str) -> Response:
    """The run's summary, steps_per_s, ranks and hosts; what is not known is null or left out of values."""
    return json_reply(worded(_query(request).now(run)))


@router.get("/runs/{run}/series", summary="Envelope (min, max, mean, count) of a metric, a series each")
def series(
    request: Request,
    run: str,
    metric: Metric,
    rank: Ranks = None,
    device: str | None = None,
    host: str | None = None,
    start: Annotated[Bound, Query(alias="from")] = None,
    stop: Annotated[Bound, Query(alias="to")] = None,
    axis: Literal["step", "time"] | None = None,
    points: Annotated[int, Query(ge=1, le=MOST_CELLS)] = 1000,
) -> Response:
    """label.NAME=VALUE chooses by label."""
    selection = _selection(request, metric, rank, device, host)
    return json_reply(_query(request).series(run, selection, Window(start, stop, points), axis))


@router.get("/runs/{run}/heatmap", summary="Map of a metric: rows × steps, pooled")
def heatmap(
    request: Request,
    run: str,
    metric: Metric,
    rows: Literal["rank", "device", "expert"] = "rank",
    rank: Ranks = None,
    device: str | None = None,
    host: str | None = None,
    start: Annotated[Bound, Query(alias="from")] = None,
    stop: Annotated[Bound, Query(alias="to")] = None,
    columns: Annotated[int, Query(ge=1, le=MOST_CELLS)] = 1000,
    pool: Literal["max", "mean", "min"] = "max",
    format: Literal["json", "binary"] = "json",
) -> Response:
    """label.NAME=VALUE chooses by label. Binary: u32 header length, JSON header, float32 rows (NaN: absent)."""
    selection = _selection(request, metric, rank, device, host)
    window = Window(start, stop, columns)
    if format == "binary":
        body = _query(request).heatmap_bytes(run, selection, window, rows, pool)
        return Response(body, media_type="application/octet-stream", headers={"cache-control": "no-store"})
    return json_reply(_query(request).heatmap(run, selection, window, rows, pool))


@router.get("/runs/{run}/latest", summary="Newest value of every series of a metric, or of several")
def latest(request: Request, run: str, metric: Metrics) -> Response:
    """{"metric", "series": [{metric, rank, host, device, labels, t_ns, step, value}]}."""
    return json_reply({"metric": metric, "series": _query(request).latest(run, *metric.split(","))})


@router.get("/runs/{run}/steps/{step}", summary="Every rank's spans of one step")
def show_step(request: Request, run: str, step: int) -> Response:
    """{"step", "ranks": […]}; 404 if no rank has recorded it."""
    return json_reply(_query(request).step(run, step))


@router.get("/runs/{run}/communication", summary="Rank by rank bytes and waiting; bus bandwidth of each group")
def communication(
    request: Request,
    run: str,
    start: Annotated[Step | None, Query(alias="from")] = None,
    stop: Annotated[Step | None, Query(alias="to")] = None,
) -> Response:
    """Sums over the steps from … to; "from" and "to" of the answer say which steps were read."""
    return json_reply(worded(_query(request).communication(run, start, stop)))


@router.get("/runs/{run}/diagnosis", summary="What holds the run back")
def diagnosis(request: Request, run: str, upto_step: Step | None = None) -> Response:
    """The verdict on the run, or on the run as it was at a step."""
    return json_reply(worded(_query(request).diagnosis(run, upto_step)))


@router.get("/runs/{run}/ledger", summary="Where the run's time went")
def ledger(request: Request, run: str, upto_step: Step | None = None) -> Response:
    """{"from_step", "to_step", "wall_s", "parts"}; a part that is not known is null."""
    return json_reply(worded(_query(request).ledger(run, upto_step)))


@router.get("/runs/{run}/alerts", summary="The findings of a run")
def alerts(request: Request, run: str) -> Response:
    """{"alerts": […]}."""
    return json_reply(worded({"alerts": _query(request).alerts(run)}))


def _query(request: Request) -> reading.Query:
    found: reading.Query = request.app.state.query
    return found


def _selection(request: Request, metric: str, rank: str | None, device: str | None, host: str | None) -> Selection:
    labels = {key[6:]: value for key, value in request.query_params.items() if key.startswith("label.")}
    return Selection(metric, _ranks(rank), device, host, labels)


def _ranks(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise BadQueryError(f"rank: {text[:40]!r} is no list of ranks", "give one rank, or several: 0,1,5")
    return tuple(sorted({int(part) for part in parts}))
