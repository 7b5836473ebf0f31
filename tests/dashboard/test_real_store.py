"""The pages on the real server: signed in by the token's address, fed over HTTP, judged by the real diagnosis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.dashboard import synthetic
from tests.dashboard.conftest import TOKEN, RealServer
from tests.dashboard.reading import drawn, says, tabled

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("dashboard")]


def test_a_run_is_drawn_and_judged_while_it_arrives(real: RealServer, open_page: Callable[..., Any]) -> None:
    real.begin("moe")
    slow = (2, 60, 1.6)
    real.send("moe", synthetic.steps(0, 120, slow=slow))
    page = open_page(real, "/run/moe")
    drawn(page, "step-time", 119)
    says(page, "#numbers", "k tok/s")
    real.send("moe", synthetic.steps(120, 140, slow=slow))
    for panel in ("step-time", "tokens", "loss"):
        drawn(page, panel, 139)
    page.wait_for_selector("#verdict[data-status='degraded']")
    says(page, "#verdict h2", "Rank 2 (host1/gpu0)")
    says(page, "#ledger", "Compute")
    page.keyboard.press("g")
    page.keyboard.press("r")
    page.select_option("#metric", "phase.duration:forward")
    page.wait_for_function("() => location.search === '?m=phase.duration:forward'")
    says(page, "#rank-map .lens-panel-legend", "time in forward")
    real.send("moe", synthetic.steps(140, 150, slow=slow))
    drawn(page, "rank-map", 149)
    assert "2 host1/gpu0" in tabled(page, "rank-map")


def test_a_token_in_the_address_signs_in_and_is_out_of_a_scripts_reach(
    real: RealServer, open_page: Callable[..., Any]
) -> None:
    page = open_page(real, f"/?token={TOKEN}", fresh=True)
    page.wait_for_selector("#runs-list > *")
    assert "token" not in page.url
    assert page.evaluate("() => document.cookie") == ""


def test_a_browser_without_the_token_gets_no_page_and_no_feed(real: RealServer, browser: Any) -> None:
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
