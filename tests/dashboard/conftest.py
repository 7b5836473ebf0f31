"""A server with the pages in a thread, and a headless Chromium that notes what a page must not do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import uvicorn
from fastapi import FastAPI

from tests.dashboard import fake_store, full_run, synthetic

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TOKEN = "token-of-these-tests"
PATIENCE_MS = 60_000


@dataclass
class Server:
    """A running server and how to send to it."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    clock: fake_store.Clock = field(default_factory=fake_store.Clock)

    @contextmanager
    def later(self, seconds: float) -> Iterator[None]:
        """The live feed's clock is that much ahead meanwhile."""
        self.clock.ahead = seconds
        try:
            yield
        finally:
            self.clock.ahead = 0.0

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> None:
        headers = {**self.headers, "content-type": content_type}
        with urlopen(Request(self.url + path, body, headers, method="POST"), timeout=100) as reply:
            reply.read()

    def get(self, path: str, accept: str = "*/*") -> tuple[dict[str, str], bytes]:
        with urlopen(Request(self.url + path, headers={**self.headers, "accept": accept}), timeout=100) as reply:
            return {key.lower(): value for key, value in reply.headers.items()}, reply.read()

    def begin(self, run: str, ranks: int = 4) -> None:
        self.post("/api/v1/runs", json.dumps(synthetic.run_object(run, ranks)).encode())

    def send(self, run: str, records: Any) -> None:
        self.post(f"/api/v1/runs/{run}/records", synthetic.ndjson(records), "application/x-ndjson")

    def judge(self, run: str, diagnosis: dict[str, Any], ledger: dict[str, Any]) -> None:
        """What the diagnosis of the fake store says from now on."""
        self.post(f"/test/{run}/diagnosis", json.dumps({"diagnosis": diagnosis, "ledger": ledger}).encode())


class Running:
    """uvicorn in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=3)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> Running:
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started and self.thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.server.started
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(120)
        assert not self.thread.is_alive(), "the server did not shut down with a page open"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The pages on the fake store."""
    clock = fake_store.Clock()
    with Running(fake_store.create_app(clock)) as running:
        yield Server(running.url, clock=clock)


class RealServer(Server):
    """The real store; records are posted as an agent does, each batch with its sequence."""

    _numbers = count()
    _sequences = count(1)

    def begin_full(self, steps: int = 0) -> str:
        """A new run of `full_run` that has reported so many steps, and everything else."""
        name = f"run{next(self._numbers)}"
        self.post("/api/v1/runs", json.dumps(full_run.run_object(name)).encode())
        if steps:
            self.send(name, full_run.records(0, steps))
        return name

    def send(self, run: str, records: Any) -> None:
        self.headers |= {"Lens-Source": "test", "Lens-Sequence": str(next(self._sequences))}
        super().send(run, records)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """``lens serve`` in a process of its own: a process that has opened one store can open no other."""
    folder: Path = tmp_path_factory.mktemp("served")
    command = [sys.executable, "-m", "lens", "serve", "--data", str(folder), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "LENS_TOKEN": TOKEN}) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the server did not come up"
        url = json.loads(line)["url"].split("/?")[0]
        yield RealServer(url, {"Authorization": f"Bearer {TOKEN}"})
        process.send_signal(signal.SIGINT)
        assert process.wait(120) is not None, "the server did not shut down with a page open"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests of a worker."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def profiles(browser: Any) -> Iterator[Callable[..., Any]]:
    """Browser profiles by scheme: pages of one share what was loaded, and are signed in to the real store."""
    contexts: dict[str, Any] = {}

    def profile(scheme: str, real_url: str | None) -> Any:
        key = f"{scheme} {real_url}"
        if key not in contexts:
            contexts[key] = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            contexts[key].set_default_timeout(PATIENCE_MS)
            if real_url:
                contexts[key].request.get(f"{real_url}/?token={TOKEN}")
        return contexts[key]

    yield profile
    for context in contexts.values():
        context.close()


@dataclass
class Watched:
    """What a page said and asked for."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def open_page(browser: Any, profiles: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server at a path. At the end no page may have complained in its console, raised an error,
    or asked another origin for anything."""
    own: list[Any] = []
    pages: list[Any] = []

    def opened(server: Server, path: str, scheme: str = "light", script: str = "", fresh: bool = False) -> Any:
        context = profiles(scheme, server.url if isinstance(server, RealServer) else None)
        if fresh:  # keeps nothing, finds nothing
            context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            context.set_default_timeout(PATIENCE_MS)
            own.append(context)
            if isinstance(server, RealServer) and "token=" not in path:
                context.request.get(f"{server.url}/?token={TOKEN}")
        page = context.new_page()
        pages.append(page)
        if script:
            page.add_init_script(script)
        seen = page.watched = Watched()
        page.origin = server.url
        page.on(
            "console", lambda message: seen.complaints.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("websocket", lambda websocket: seen.requests.append(websocket.url.replace("ws://", "http://")))
        page.goto(server.url + path)
        return page

    yield opened
    for each in [*pages, *own]:
        each.close()
    for page in pages:
        assert page.watched.complaints == []
        allowed = (page.origin, "data:", "blob:")
        assert [url for url in page.watched.requests if not url.startswith(allowed)] == []
