"""The HTTP application: routes, errors, access, and everything that lives as long as the server does."""

from __future__ import annotations

import importlib
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import anyio.to_thread
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from lens.settings import Settings
from lens.store import ingest, live, reads
from lens.store.access import Access, Guard, guard_of, token_of
from lens.store.alerts import Alerts
from lens.store.audit import Audit, Refusals
from lens.store.bridges import route as bridges
from lens.store.bridges.otlp_grpc import MetricsService
from lens.store.export import route as export
from lens.store.folder import DataFolder, Limits
from lens.store.ingest import Ingest
from lens.store.live import LiveFeed
from lens.store.ownership import read_server
from lens.store.prices import Prices
from lens.store.query import Query
from lens.store.replies import error_reply, install_error_handlers, json_reply, status_of
from lens.store.sql import route as sql
from lens.store.tokens import Tokens
from lens.store.upkeep import route as upkeep
from lens.store.upkeep.keeper import Upkeep
from lens.store.verdicts import Verdicts
from lens.store.webhook import Webhook
from lens.store.worker import DiagnosisWorker

_ROUTERS = (ingest.router, reads.router, sql.router, export.router, live.router, bridges.router, upkeep.router)
_ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def create_app(
    settings: Settings,
    *,
    store: DataFolder | None = None,
    limits: Limits | None = None,
    guard: Guard | None = None,
    hosts: Iterable[str] = (),
    otlp_grpc: str | None = None,
) -> FastAPI:
    """The application for a data folder.

    `store` is the folder, if it is open already; the application closes it when it ends. `guard` says who may ask;
    without it, those of this machine who know the token of the folder, by the usual names and `hosts`. `otlp_grpc` is
    an address to take OTLP over gRPC at too.

    Raises:
        StoreError: the token file cannot be kept.
        SettingsError: a price or the webhook's URL cannot be used.
        ImportError, OSError: gRPC is asked for and not installed, or its address cannot be listened on.
    """
    prices = Prices.parse(settings.device_hour_price)
    webhook = Webhook(settings.alert_webhook, partial(_page_of, settings.data)) if settings.alert_webhook else None
    rules = guard or guard_of(token_of(settings.data, settings.token), "127.0.0.1", hosts, Tokens(settings.data))

    refusals = Refusals(Audit(settings.data))
    bounds = limits or (store.limits if store is not None else Limits())
    grpc = MetricsService(otlp_grpc, rules, bounds.body, bounds.requests, refusals) if otlp_grpc else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        folder = store
        if folder is None:
            folder = await anyio.to_thread.run_sync(DataFolder, settings.data, limits, settings.clickhouse)
        worker = DiagnosisWorker()
        app.state.folder, app.state.live = folder, LiveFeed()
        app.state.query = Query(folder, worker.evaluate, prices)
        alerts = Alerts(settings.data, [webhook] if webhook else [], {run.id for run in folder.registry.runs()})
        verdicts = Verdicts(app.state.query, app.state.live, alerts)
        app.state.ingest = Ingest(folder, app.state.live, verdicts)
        app.state.recent = bridges.Recent()
        app.state.upkeep = keeper = Upkeep(folder)
        threading.Thread(target=_load_decoders, name="lens-decoders", daemon=True).start()
        keeper.start()
        verdicts.start()
        if webhook:
            webhook.start()
        if grpc is not None:
            ingest, recent = app.state.ingest, app.state.recent
            grpc.start(lambda *words: bridges.store_body(ingest, recent, *words), status_of)
        try:
            yield
        finally:
            if grpc is not None:
                await anyio.to_thread.run_sync(grpc.stop)
            verdicts.stop()
            if webhook:
                webhook.stop()
            worker.close()
            await anyio.to_thread.run_sync(refusals.close)
            await anyio.to_thread.run_sync(keeper.stop)
            await anyio.to_thread.run_sync(folder.close)

    # No /docs: that page would load scripts from elsewhere.
    app = FastAPI(title="lens", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.otlp_grpc_port = grpc.port if grpc is not None else None
    install_error_handlers(app)
    for router in _ROUTERS:
        app.include_router(router)
    app.add_api_route("/healthz", _health, methods=["GET"], summary="Whether the server works", tags=["server"])
    # Pages are attached later and answer any path: what is unknown under /api must not reach them.
    app.add_api_route("/api/{path:path}", _unknown, methods=_ALL_METHODS, include_in_schema=False)
    app.add_middleware(Access, guard=rules, refusals=refusals)
    return app


def _load_decoders() -> None:
    """What the first batch would wait for."""
    for name in ("arrow_decode", "slots_decode"):
        importlib.import_module(f"lens.store.{name}")


def _page_of(data: Path, run: str) -> str | None:
    """Where a run's page is, as this server said of itself."""
    served = read_server(data)
    return f"{served['url']}/run/{quote(run)}" if served else None


def _health(request: Request) -> Response:
    """No token needed, nothing told but whether records can be taken and read."""
    failure = request.app.state.folder.applier.failure
    if failure:
        return error_reply(503, "the database takes nothing at the moment", "see the server's log")
    return json_reply({"status": "ok"})


def _unknown(request: Request) -> Response:
    """404, or 405 where the path exists for another method."""
    allowed: set[str] = set()
    for router in _ROUTERS:
        for route in router.routes:
            if route.matches(request.scope)[0] is Match.PARTIAL:
                allowed |= getattr(route, "methods", None) or set()
    if allowed:
        raise HTTPException(405, headers={"allow": ", ".join(sorted(allowed))})
    raise HTTPException(404)
