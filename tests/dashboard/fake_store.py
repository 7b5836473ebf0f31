"""A small store with the read routes that the pages need, over records posted as NDJSON and kept in memory."""

from __future__ import annotations

import json
import math
import struct
import time
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lens.dashboard import mount
from lens.slots import NULL
from lens.store.live import LiveFeed, router
from lens.tables import Tables, TablesBuilder

UNITS = {"step.duration": "s", "phase.duration": "s", "step.tokens": "{token}", "train.loss": "1"}


class FakeQuery:
    """Runs and their records; `run` is what the live feed asks for."""

    def __init__(self) -> None:
        self.about: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, list[Tables]] = {}
        self.diagnosis: dict[str, dict[str, Any]] = {}
        self.ledger: dict[str, dict[str, Any]] = {}

    def run(self, run: str) -> dict[str, Any]:
        tables = self.tables(run)
        last_step = int(tables.steps["step"].max()) if tables.count("steps") else None
        last_t = int(tables.steps["t1_ns"].max()) if tables.count("steps") else None
        about = self.about[run]
        age = None if last_t is None else max(0.0, time.time() - last_t / 1e9)
        return {
            "name": run, "started_ns": None, "groups": {}, "config": {}, "tags": [], "ranks": [],
            "simulated": False, "drops": {"lost_slots": 0, "given_up": 0, "rejected": 0},
            "metrics": [{"metric": name, "unit": UNITS.get(name, "1")} for name in self.metrics(tables)],
            "last_step": last_step, "last_t_ns": last_t, "age_s": age,
            "ranks_reporting": len(np.unique(tables.steps["rank"])),
            "state": "live" if age is not None and age < 10 else "stale",
            **about,
        }  # fmt: skip

    def tables(self, run: str) -> Tables:
        if run not in self.about:
            raise LookupError(run)
        return Tables.concat(self.parts[run])

    @staticmethod
    def metrics(tables: Tables) -> list[str]:
        return sorted({tables.strings[code] for code in np.unique(tables.samples["metric"])} | {"step.duration"})

    def cells(self, run: str, metric: str, phase: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, ranks and values of a metric."""
        tables = self.tables(run)
        steps, spans, samples = tables.steps, tables.spans, tables.samples
        if metric == "step.duration":
            return steps["step"], steps["rank"], (steps["t1_ns"] - steps["t0_ns"]) / 1e9
        if metric == "step.tokens":
            known = steps["tokens"] != NULL
            return steps["step"][known], steps["rank"][known], steps["tokens"][known].astype(float)
        if metric == "phase.duration":
            rows = spans["name"] == tables.code(phase or "")
            return spans["step"][rows], spans["rank"][rows], (spans["t1_ns"][rows] - spans["t0_ns"][rows]) / 1e9
        rows = samples["metric"] == tables.code(metric)
        return samples["step"][rows], samples["rank"][rows], samples["value"][rows]


class Clock:
    """A clock that stands still until a test moves it: however slow the machine, what has come is of this moment."""

    ahead = 0.0

    def __call__(self) -> float:
        return self.ahead


def create_app(clock: Clock) -> FastAPI:
    """The fake store with the real live feed and the real pages."""
    app = FastAPI(docs_url=None, redoc_url=None)
    query, feed = FakeQuery(), LiveFeed(clock=clock)
    app.state.query, app.state.live = query, feed

    @app.exception_handler(LookupError)
    async def unknown(_: Request, error: LookupError) -> JSONResponse:
        return JSONResponse({"error": f"unknown run {error}", "hint": "GET /api/v1/runs lists all runs"}, 404)

    @app.post("/api/v1/runs")
    async def post_run(request: Request) -> dict[str, str]:
        body = await request.json()
        query.about.setdefault(body["run"], {}).update(body)
        query.parts.setdefault(body["run"], [])
        return {"run": body["run"]}

    @app.post("/api/v1/runs/{run}/records")
    async def post_records(run: str, request: Request) -> dict[str, int]:
        builder = TablesBuilder()
        for line in (await request.body()).splitlines():
            builder.add(json.loads(line))
        tables = builder.build()
        query.parts[run].append(tables)
        feed.publish(run, tables)
        return {"accepted": tables.total}

    @app.post("/test/{run}/diagnosis")
    async def post_diagnosis(run: str, request: Request) -> None:
        body = await request.json()
        query.diagnosis[run], query.ledger[run] = body["diagnosis"], body["ledger"]
        feed.publish_diagnosis(run, body["diagnosis"], body["ledger"])

    @app.get("/api/v1/runs")
    def runs() -> dict[str, Any]:
        return {"runs": [query.run(run) for run in reversed(query.about)]}

    @app.get("/api/v1/runs/{run}")
    def run(run: str) -> dict[str, Any]:
        return query.run(run)

    @app.get("/api/v1/runs/{run}/series")
    def series(request: Request, run: str, metric: str, points: int = 1000) -> JSONResponse:
        steps, ranks, values = query.cells(run, metric, request.query_params.get("label.phase"))
        params = request.query_params
        inside = (steps >= int(params.get("from", 0))) & (steps <= int(params.get("to", 2**62)))
        steps, ranks, values = steps[inside], ranks[inside], values[inside]
        result = []
        for rank in np.unique(ranks).tolist():
            rows = np.flatnonzero(ranks == rank)
            rows = rows[np.argsort(steps[rows])]
            ys = [value if math.isfinite(value) else str(value) for value in values[rows].tolist()]
            ys = [{"nan": "NaN", "inf": "Infinity"}.get(y, y) if isinstance(y, str) else y for y in ys]
            xs = steps[rows].tolist()
            envelope = {"x": xs, "min": ys, "max": ys, "mean": ys, "count": [1] * len(xs)}
            result.append(
                {"rank": rank if rank >= 0 else None, "host": None, "device": None, "labels": {}, **envelope}
            )
        return JSONResponse({"metric": metric, "unit": UNITS.get(metric, "1"), "axis": "step", "series": result})

    @app.get("/api/v1/runs/{run}/heatmap")
    def heatmap(request: Request, run: str, metric: str, pool: str = "max", columns: int = 1000) -> Response:
        params = request.query_params
        steps, ranks, values = query.cells(run, metric, params.get("label.phase"))
        first = int(params.get("from", steps.min() if len(steps) else 0))
        last = int(params.get("to", steps.max() if len(steps) else 0))
        inside = (steps >= first) & (steps <= last)
        steps, ranks, values = steps[inside], ranks[inside], values[inside]
        rows = np.unique(ranks).tolist()
        width = max(1, -(-(last - first + 1) // columns))
        count = -(-(last - first + 1) // width)
        grid = np.full((len(rows), count), -np.inf if pool == "max" else 0.0)
        seen = np.zeros((len(rows), count))
        at = (np.searchsorted(rows, ranks), (steps - first) // width)
        (np.maximum if pool == "max" else np.add).at(grid, at, values)
        np.add.at(seen, at, 1)
        if pool == "mean":
            grid /= np.maximum(seen, 1)
        grid[seen == 0] = np.nan
        header = {
            "metric": metric, "unit": UNITS.get(metric, "1"), "rows": rows, "row_kind": "rank", "from": first,
            "to": last, "width": width, "columns": count,
        }  # fmt: skip
        text = json.dumps(header).encode()
        body = struct.pack("<I", len(text)) + text + grid.astype("<f4").tobytes()
        return Response(body, media_type="application/octet-stream")

    @app.get("/api/v1/runs/{run}/latest")
    def latest(run: str, metric: str) -> dict[str, Any]:
        return {"metric": metric, "series": []}

    @app.get("/api/v1/runs/{run}/steps/{step}")
    def step(run: str, step: int) -> dict[str, Any]:
        return {"step": step, "ranks": []}

    @app.get("/api/v1/runs/{run}/diagnosis")
    def diagnosis(run: str) -> dict[str, Any]:
        empty = {"run": run, "upto_step": None, "status": "insufficient", "hypotheses": [], "coverage": {}}
        return query.diagnosis.get(run) or empty

    @app.get("/api/v1/runs/{run}/ledger")
    def ledger(run: str) -> dict[str, Any]:
        return query.ledger.get(run) or {"from_step": None, "to_step": None, "wall_s": None, "parts": {}}

    @app.get("/api/{rest:path}")
    def no_such_route(rest: str) -> JSONResponse:
        return JSONResponse({"error": f"no route /api/{rest}", "hint": "/openapi.json lists all routes"}, 404)

    app.include_router(router)
    mount(app)
    return app
