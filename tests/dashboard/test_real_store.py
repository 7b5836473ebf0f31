"""The pages on the real server: signed in by the token's address, fed over HTTP, judged by the real diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lens.dashboard import mount
from lens.settings import Settings
from lens.store.app import create_app
from tests.dashboard import synthetic
from tests.dashboard.conftest import Running, Server
from tests.dashboard.test_pages import drawn, text

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("dashboard")]
TOKEN = "token-of-this-test"


class Sender:
    """Posts records as an agent does: each batch with its sequence."""

    def __init__(self, server: Server) -> None:
        self._server, self._sequence = server, 0

    def __call__(self, run: str, records: Any) -> None:
        self._sequence += 1
        self._server.headers |= {"Lens-Source": "test", "Lens-Sequence": str(self._sequence)}
        self._server.send(run, records)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on an empty data folder."""
    folder: Path = tmp_path_factory.mktemp("data")
    app = create_app(Settings.load(data=folder, token=TOKEN))
    mount(app)
    with Running(app) as running:
        yield Server(running.url, {"Authorization": f"Bearer {TOKEN}"})


def test_an_empty_store_names_the_command_that_fills_it(real: Server, open_page: Callable[..., Any]) -> None:
    page = open_page(f"{real.url}/?token={TOKEN}")
    page.wait_for_selector("#runs-list code:text-is('lens demo')")
    assert "lens run -- torchrun train.py" in text(page, "#runs-list")
    assert "token" not in page.url
    assert page.evaluate("() => document.cookie") == "", "the token is out of a script's reach"


def test_both_pages_draw_what_the_store_was_sent(real: Server, open_page: Callable[..., Any]) -> None:
    send = Sender(real)
    real.begin("moe")
    slow = (2, 60, 1.6)
    send("moe", synthetic.steps(0, 120, slow=slow))
    page = open_page(f"{real.url}/?token={TOKEN}")
    page.goto(f"{real.url}/run/moe")
    drawn(page, "step-time", 119)
    page.wait_for_function("() => document.querySelector('#numbers').innerText.includes('k tok/s')")
    send("moe", synthetic.steps(120, 140, slow=slow))
    for panel in ("step-time", "tokens", "loss"):
        drawn(page, panel, 139)
    page.wait_for_selector("#verdict[data-status='degraded']", timeout=60_000)
    assert "Rank 2 (host1/gpu0)" in text(page, "#verdict h2")
    assert "Compute" in text(page, "#ledger")
    page.keyboard.press("g")
    page.keyboard.press("r")
    page.select_option("#metric", "phase.duration:forward")
    page.wait_for_function("() => location.search === '?m=phase.duration:forward'")
    page.wait_for_selector("#rank-map .lens-panel-legend :text('time in forward')")
    send("moe", synthetic.steps(140, 150, slow=slow))
    drawn(page, "rank-map", 149)
    page.click("#rank-map .lens-panel-tools button:text-is('Table')")
    page.wait_for_function("() => document.querySelectorAll('#rank-map tbody tr').length === 4")


def test_a_browser_without_the_token_gets_no_page_and_no_feed(real: Server, browser: Any) -> None:
    context = browser.new_context()
    page = context.new_page()
    reply = page.goto(f"{real.url}/run/moe")
    assert reply is not None
    assert reply.status == 401
    closed = page.evaluate(
        """url => new Promise(resolve => { const socket = new WebSocket(url);
        socket.onclose = () => resolve('closed'); socket.onopen = () => resolve('open'); })""",
        real.url.replace("http", "ws") + "/api/v1/runs/moe/live",
    )
    assert closed == "closed"
    context.close()
