"""The pages in a real browser: they draw what arrives, name what is missing, and keep the address true."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from tests.dashboard import fake_store, synthetic
from tests.dashboard.conftest import Running, Server

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("dashboard")]
Open = Callable[..., Any]
NUMBERS = count()
PAGE_LIMIT = 2 * 2**20


@pytest.fixture
def run(server: Server) -> str:
    """A run of four ranks that has reported 60 steps."""
    name = f"run-{next(NUMBERS)}"
    server.begin(name)
    server.send(name, synthetic.steps(0, 60))
    return name


def drawn(page: Any, panel: str, step: int) -> None:
    """Wait until a panel has drawn this step."""
    page.wait_for_function(
        "([panel, step]) => Number(document.getElementById(panel)?.dataset.drawnStep ?? -1) >= step",
        arg=[panel, step],
        timeout=20_000,
    )


def text(page: Any, selector: str) -> str:
    return re.sub(r"[\s\u2009\u00a0]+", " ", page.locator(selector).inner_text())


def pixels(page: Any, selector: str) -> str:
    """What a canvas shows."""
    result: str = page.eval_on_selector(selector, "canvas => canvas.toDataURL()")
    return result


def colours(page: Any, selector: str) -> int:
    """How many different colours a canvas holds."""
    script = """canvas => new Set(new Uint32Array(canvas.getContext('2d')
        .getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"""
    result: int = page.eval_on_selector(selector, script)
    return result


def test_overview_draws_what_arrives_while_it_is_open(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}")
    drawn(page, "step-time", 59)
    before = {panel: pixels(page, f"#{panel} canvas") for panel in ("step-time", "tokens", "loss")}
    assert all(colours(page, f"#{panel} canvas") > 3 for panel in before)
    server.send(run, synthetic.steps(60, 90))
    drawn(page, "step-time", 89)
    for panel, picture in before.items():
        drawn(page, panel, 89)
        assert pixels(page, f"#{panel} canvas") != picture
    assert "Last step 89 4 of 4 ranks reporting" in text(page, "#numbers")
    assert "live" in text(page, "#status")
    page.click("#step-time .lens-panel-tools button:text-is('Table')")
    page.wait_for_selector("#step-time tbody th:text-is('89')")
    server.send(run, synthetic.steps(90, 95))
    page.wait_for_selector("#step-time tbody th:text-is('94')")


def test_rank_map_draws_what_arrives_while_it_is_open(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}/ranks?m=phase.duration:forward")
    drawn(page, "rank-map", 59)
    before = pixels(page, "#rank-map canvas.lens-map")
    server.send(run, synthetic.steps(60, 200, slow=(2, 60, 2.0)))
    drawn(page, "rank-map", 199)
    assert pixels(page, "#rank-map canvas.lens-map") != before
    # No rank is chosen: the slowest is shown, looked for anew every few seconds.
    page.wait_for_selector("#rank-series .lens-panel-legend :text('highest median')")
    for step in range(200, 240):
        if "rank 2" in text(page, "#rank-series .lens-panel-legend"):
            break
        server.send(run, synthetic.steps(step, step + 1, slow=(2, 60, 2.0)))
        time.sleep(0.2)
    assert "rank 2" in text(page, "#rank-series .lens-panel-legend")
    page.click("#rank-map .lens-panel-tools button:text-is('Table')")
    page.wait_for_function("() => document.querySelectorAll('#rank-map tbody tr').length === 4")
    assert "host1/gpu0" in text(page, "#rank-map tbody tr:nth-child(3)")


def test_the_pointer_reads_a_cell_and_a_click_follows_the_rank(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}/ranks")
    drawn(page, "rank-map", 59)
    box = page.locator("canvas.lens-map-over").bounding_box()
    row_of_rank_3 = box["y"] + 16 + 3.5 * 34
    page.mouse.move(box["x"] + box["width"] * 0.6, row_of_rank_3)
    tip = text(page, ".lens-tip")
    assert re.search(r"rank 3 · host1/gpu1 [\d.]+ ms step \d+", tip), tip
    page.mouse.click(box["x"] + box["width"] * 0.6, row_of_rank_3)
    page.wait_for_function("() => location.search === '?rank=3'")
    page.wait_for_function(
        "() => document.querySelector('#rank-series .lens-panel-legend').innerText.includes('rank 3')"
    )


def test_the_map_can_be_read_with_the_keyboard(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}/ranks")
    drawn(page, "rank-map", 59)
    page.focus("canvas.lens-map-over")
    page.keyboard.press("ArrowDown")
    label = page.get_attribute("canvas.lens-map-over", "aria-label")
    assert "rank 1" in label
    assert "step 59" in label
    page.keyboard.press("Enter")
    assert page.url.endswith("?rank=1")


def test_the_verdict_comes_first_and_arrives_by_itself(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}")
    page.wait_for_selector("#verdict[data-status='insufficient']")
    server.judge(run, synthetic.healthy(run, 59), synthetic.ledger(59))
    page.wait_for_selector("#verdict[data-status='healthy']")
    assert text(page, "#verdict h2") == "Nothing holds this run back."
    server.judge(run, synthetic.slow_device(run, 59, onset=40), synthetic.ledger(59, waiting=0.21))
    page.wait_for_selector("#verdict[data-status='degraded']")
    verdict = text(page, "#verdict")
    for part in (
        "Rank 2 (host1/gpu0) computes slower than its peers since step 40.",
        "38.4 % longer",
        "confidence 94 %",
        "SM clock of rank 2 990 MHz instead of 1 980 MHz (−50 %)",
        "Hot expert: milliseconds per token rose",
        "Take host1/gpu0 out of the job",
        "42.4 ms instead of 58.7 ms",
        "Judged without: net.rdma.retransmits",
    ):
        assert part in verdict
    ledger = text(page, "#ledger")
    assert "Waiting for the slowest rank idle inside a collective until the last rank joins 21 %" in ledger
    assert "Not measured in this run: garbage collection, pipeline bubble" in ledger


def test_the_address_restores_exactly_what_was_shown(server: Server, open_page: Open, run: str) -> None:
    path = f"/run/{run}/ranks?x=10-40&rank=3,1&m=phase.duration:forward"
    page = open_page(server.url + path)
    drawn(page, "rank-map", 40)
    assert page.input_value("#metric") == "phase.duration:forward"
    assert page.input_value("#rank-filter") == "3,1"
    assert "only steps 10–40" in text(page, "#status")
    legend = text(page, "#rank-series .lens-panel-legend")
    assert "rank 3" in legend
    assert "rank 1" in legend
    page.keyboard.press("g")
    page.keyboard.press("o")
    page.wait_for_selector("#page-overview:not([hidden])")
    assert page.url == f"{server.url}/run/{run}?x=10-40&rank=3,1&m=phase.duration:forward"
    drawn(page, "step-time", 40)
    page.click("#step-time .lens-panel-tools button:text-is('Table')")
    page.wait_for_selector("#step-time tbody tr")
    steps = page.eval_on_selector_all("#step-time tbody th", "cells => cells.map(cell => Number(cell.innerText))")
    assert (min(steps), max(steps)) == (10, 40)
    page.keyboard.press("g")
    page.keyboard.press("r")
    page.wait_for_selector("#page-ranks:not([hidden])")
    assert page.url == server.url + path
    page.reload()
    drawn(page, "rank-map", 40)
    assert page.url == server.url + path
    page.go_back()
    page.wait_for_selector("#page-overview:not([hidden])")


def test_zoom_by_dragging_and_by_keys(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}")
    drawn(page, "step-time", 59)
    box = page.locator("#step-time .u-over").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, middle, steps=4)
    page.mouse.up()
    page.wait_for_function("() => /x=1[45]-4[45]/.test(location.search)")
    page.keyboard.press("+")
    page.wait_for_function("() => /x=2[0-9]-3[0-9]/.test(location.search)")
    page.keyboard.press("0")
    page.wait_for_function("() => location.search === ''")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_the_reader(server: Server, open_page: Open, run: str, scheme: str) -> None:
    page = open_page(f"{server.url}/run/{run}", scheme)
    drawn(page, "step-time", 59)
    ground = "() => getComputedStyle(document.body).backgroundColor"
    bright = {"light": "rgb(245, 246, 248)", "dark": "rgb(14, 19, 24)"}
    assert page.evaluate(ground) == bright[scheme]
    picture = pixels(page, "#step-time canvas")
    page.click("#theme-toggle")
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate(ground) == bright[other]
    page.wait_for_function("old => document.querySelector('#step-time canvas').toDataURL() !== old", arg=picture)
    page.reload()
    drawn(page, "step-time", 59)
    assert page.evaluate(ground) == bright[other], "the choice is kept"


def test_a_silent_run_is_called_stale_and_its_pictures_fade(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}")
    page.wait_for_selector("#status [data-state='live']")
    opacity = "() => Number(getComputedStyle(document.querySelector('#step-time canvas')).opacity)"
    assert page.evaluate(opacity) == 1
    with server.later(60):
        page.wait_for_selector("#status [data-state='stale']")
        assert page.evaluate(opacity) < 1
        assert "▲ 0 of 4 ranks" in text(page, "#status")
        assert re.search(r"data 6\d s old", text(page, "#status"))
    page.wait_for_selector("#status [data-state='live']")


def test_an_ended_run_is_called_ended(server: Server, open_page: Open, run: str) -> None:
    server.post("/api/v1/runs", json.dumps({"run": run, "state": "ended"}).encode())
    with server.later(60):
        page = open_page(f"{server.url}/run/{run}")
        page.wait_for_selector("#status [data-state='ended']")
        drawn(page, "step-time", 59)
        assert "run ended · 4 ranks" in text(page, "#numbers")


def test_missing_values_are_named_and_never_zero(server: Server, open_page: Open) -> None:
    name = f"bare-{next(NUMBERS)}"
    server.begin(name)
    page = open_page(f"{server.url}/run/{name}")
    page.wait_for_selector("#step-time .lens-message:has-text('no step has ended yet')")
    assert "Step time n/a no step has ended yet" in text(page, "#numbers")
    assert "Waiting for the first step." in text(page, "#verdict")
    bare = [{**record, "attrs": {}} for record in synthetic.steps(0, 20) if record.get("kind") == "step"]
    server.send(name, [record for record in bare if record["rank"] != 3])
    drawn(page, "step-time", 19)
    assert "n/a" in text(page, "#loss .lens-message")
    assert "lens.log(loss=…)" in text(page, "#loss .lens-message")
    assert "lens.step(tokens=…)" in text(page, "#tokens .lens-message")
    assert "▲ 3 of 4 ranks" in text(page, "#status")


def test_a_loss_that_is_no_number_is_said_and_not_drawn(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}")
    drawn(page, "loss", 59)
    now = time.time_ns()
    server.send(
        run,
        [
            {"type": "sample", "t_ns": now, "metric": "train.loss", "value": "NaN", "rank": 0, "step": s}
            for s in (60, 61)
        ],
    )
    page.wait_for_selector("#numbers :text('not finite since step 60')")
    page.wait_for_selector("#loss .lens-note:has-text('not a finite number since step 60')")
    page.reload()
    page.wait_for_selector("#numbers :text('not finite since step 60')")


def test_the_list_of_runs_leads_to_the_newest(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server.url)
    page.click("a.lens-button")
    page.wait_for_url(f"{server.url}/run/{run}")
    drawn(page, "step-time", 59)
    page.keyboard.press("g")
    page.keyboard.press("l")
    page.wait_for_selector("#page-runs:not([hidden]) table")


def test_help_opens_and_closes_by_key(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}")
    drawn(page, "step-time", 59)
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open] :text('Reading the pages')")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")


@pytest.mark.parametrize(("path", "panel"), [("", "step-time"), ("/ranks", "rank-map")])
def test_every_picture_can_be_saved(server: Server, open_page: Open, run: str, path: str, panel: str) -> None:
    page = open_page(f"{server.url}/run/{run}{path}")
    drawn(page, panel, 59)
    with page.expect_download() as saved:
        page.click(f"#{panel} .lens-panel-tools button:text-is('CSV')")
    lines = saved.value.path().read_text().splitlines()
    assert saved.value.suggested_filename == f"{run}-{panel}.csv"
    assert lines[0].startswith("step,")
    assert len(lines) == (61 if panel == "step-time" else 4 * 60 + 1)
    assert "(s)" in lines[0]
    with page.expect_download() as saved:
        page.click(f"#{panel} .lens-panel-tools button:text-is('PNG')")
    assert saved.value.path().read_bytes().startswith(b"\x89PNG")


def test_a_single_slow_step_stays_visible_when_steps_share_a_column(server: Server, open_page: Open) -> None:
    name = f"long-{next(NUMBERS)}"
    server.begin(name, ranks=2)
    records = [record for record in synthetic.steps(1, 3001, ranks=2) if record.get("kind") == "step"]
    slow = next(record for record in records if record["rank"] == 1 and record["step"] == 1777)
    slow["t1_ns"] += 10**9
    server.send(name, records)
    page = open_page(f"{server.url}/run/{name}/ranks")
    drawn(page, "rank-map", 3000)
    assert "each column: the highest of 3 steps" in text(page, "#rank-map .lens-panel-legend")
    page.click("#rank-map .lens-panel-tools button:text-is('Table')")
    page.wait_for_selector("#rank-map tbody tr")
    assert "1.04 s" in text(page, "#rank-map tbody tr:nth-child(2)") or "1.05 s" in text(
        page, "#rank-map tbody tr:nth-child(2)"
    )


def test_a_page_weighs_less_than_two_megabytes(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}")
    drawn(page, "step-time", 59)
    script = """() => [...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]
        .reduce((sum, entry) => sum + entry.decodedBodySize, 0)"""
    assert 0 < page.evaluate(script) < PAGE_LIMIT
    assert not [url for url in page.watched.requests if "plotly" in url]


def test_the_page_goes_on_where_it_was_when_its_connection_was_cut(
    server: Server, open_page: Open, run: str
) -> None:
    note_sockets = """const Plain = WebSocket; window.sockets = [];
        window.WebSocket = class extends Plain { constructor(url) { super(url); window.sockets.push(this); } };"""
    page = open_page(f"{server.url}/run/{run}", script=note_sockets)
    drawn(page, "step-time", 59)
    page.wait_for_selector("#status [data-state='live']")
    page.evaluate("() => window.sockets[0].close()")
    page.wait_for_selector("#status [data-state='offline']")
    server.send(run, synthetic.steps(60, 70))
    drawn(page, "step-time", 69)
    page.wait_for_selector("#status [data-state='live']")
    assert "cursor=" in page.evaluate("() => window.sockets.at(-1).url")
    page.click("#step-time .lens-panel-tools button:text-is('Table')")
    page.wait_for_selector("#step-time tbody th:text-is('60')")


def test_the_server_stops_while_a_page_is_open(browser: Any) -> None:
    context = browser.new_context()
    with Running(fake_store.create_app(fake_store.Clock())) as running:
        server = Server(running.url)
        server.begin("moe")
        server.send("moe", synthetic.steps(0, 5))
        page = context.new_page()
        page.goto(f"{running.url}/run/moe")
        page.wait_for_selector("#status [data-state='live']")
    page.wait_for_selector("#status [data-state='offline']")
    context.close()


def test_pages_carry_a_strict_policy(server: Server) -> None:
    headers, body = server.get("/run/any", "text/html")
    policy = headers["content-security-policy"]
    script = next(rule for rule in policy.split("; ") if rule.startswith("script-src"))
    assert "unsafe" not in script
    assert re.fullmatch(r"script-src 'self'( 'sha256-[^']+')+", script)
    assert b"plotly" not in body.replace(b"plotly.com", b"").replace(b"plotly_", b"")
    headers, _ = server.get("/assets/lens.js")
    assert headers["cache-control"] == "no-cache"


def test_an_unknown_address_says_so(server: Server, open_page: Open, run: str) -> None:
    page = open_page(f"{server.url}/run/{run}/nonsense")
    page.wait_for_selector("#notice:has-text('There is no such page')")
