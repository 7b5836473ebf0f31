"""A server with the pages in a thread, and a headless Chromium that notes what a page must not do."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.request import Request, urlopen

import pytest
import uvicorn
from fastapi import FastAPI

from tests.dashboard import fake_store, synthetic

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
        yield
        self.clock.ahead = 0.0

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> None:
        headers = {**self.headers, "content-type": content_type}
        with urlopen(Request(self.url + path, body, headers, method="POST"), timeout=30) as reply:
            reply.read()

    def get(self, path: str, accept: str = "*/*") -> tuple[dict[str, str], bytes]:
        with urlopen(Request(self.url + path, headers={**self.headers, "accept": accept}), timeout=30) as reply:
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
        self.thread.join(30)
        assert not self.thread.is_alive(), "the server did not shut down with a page open"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The pages on the fake store."""
    clock = fake_store.Clock()
    with Running(fake_store.create_app(clock)) as running:
        yield Server(running.url, clock=clock)


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


@dataclass
class Watched:
    """What a page said and asked for."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens an address in a fresh profile. At the end no page may have complained in its console, raised an error,
    or asked another origin for anything."""
    contexts: list[Any] = []
    watched: list[tuple[str, Watched]] = []

    def opened(address: str, scheme: str = "light", script: str = "", **options: Any) -> Any:
        options = {"viewport": {"width": 1280, "height": 900}, "color_scheme": scheme, **options}
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        if script:
            page.add_init_script(script)
        seen = Watched()
        watched.append((address.split("/run/")[0].rstrip("/").split("/?")[0], seen))
        page.on(
            "console", lambda message: seen.complaints.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("websocket", lambda websocket: seen.requests.append(websocket.url.replace("ws://", "http://")))
        page.watched = seen
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    for origin, seen in watched:
        assert seen.complaints == []
        outside = [url for url in seen.requests if not url.startswith((origin, "data:", "blob:"))]
        assert outside == []
