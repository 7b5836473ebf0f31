"""The pages in a real browser, on a store that says what the test wants: the verdict, the state, the pointer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from tests.dashboard import fake_store, synthetic
from tests.dashboard.conftest import PATIENCE_MS, Running, Server
from tests.dashboard.reading import drawn, pixels, press, says, text

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("dashboard")]
Open = Callable[..., Any]
NUMBERS = count()
PAGE_LIMIT = 2 * 2**20
CUT_AND_SEEN = """() => new Promise(done => { window.sockets[0].close();
    const look = setInterval(() => { if (!document.querySelector("#status [data-state='offline']")) return;
        clearInterval(look); done(); }, 10); })"""
"""Looks from within: the page may be connected again before a test has come to look."""


@pytest.fixture
def run(server: Server) -> str:
    """A run of four ranks that has reported 60 steps."""
    name = f"run-{next(NUMBERS)}"
    server.begin(name)
    server.send(name, synthetic.steps(0, 60))
    return name


def test_the_table_beside_a_picture_grows_with_it(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}")
    drawn(page, "step-time", 59)
    says(page, "#numbers", "Last step 59 4 of 4 ranks reporting")
    says(page, "#status", "live")
    press(page, "step-time", "Table")
    page.wait_for_selector("#step-time tbody th:text-is('59')")
    server.send(run, synthetic.steps(60, 65))
    page.wait_for_selector("#step-time tbody th:text-is('64')")
    says(page, "#numbers", "Last step 64")


def test_the_slowest_rank_is_followed_where_none_is_chosen(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}/ranks?m=phase.duration:forward")
    drawn(page, "rank-map", 59)
    server.send(run, synthetic.steps(60, 200, slow=(2, 60, 2.0)))
    drawn(page, "rank-map", 199)
    says(page, "#rank-series .lens-panel-legend", "no rank chosen: shown is the one with the highest median")
    step, end = 200, time.monotonic() + 60  # it is looked for anew every few seconds
    while "rank 2" not in text(page, "#rank-series .lens-panel-legend") and time.monotonic() < end:
        server.send(run, synthetic.steps(step, step + 1, slow=(2, 60, 2.0)))
        step += 1
        time.sleep(0.2)
    says(page, "#rank-series .lens-panel-legend", "rank 2")


def test_the_pointer_reads_a_cell_and_a_click_follows_the_rank(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}/ranks")
    drawn(page, "rank-map", 59)
    tip, end = "", time.monotonic() + 60
    while not re.search(r"rank 3 · host1/gpu1 [\d.]+ ms step \d+", tip):
        assert time.monotonic() < end, tip
        box = page.locator("canvas.lens-map-over").bounding_box()  # a panel above may have grown by a line
        there = box["x"] + box["width"] * 0.6, box["y"] + 16 + 3.5 * 34
        page.mouse.move(*there)
        tip = text(page, ".lens-tip")
    page.mouse.click(*there)
    page.wait_for_function("() => location.search === '?rank=3'")
    page.wait_for_function(
        "() => document.querySelector('#rank-series .lens-panel-legend').innerText.includes('rank 3')"
    )


def test_the_map_can_be_read_with_the_keyboard(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}/ranks")
    drawn(page, "rank-map", 59)
    page.focus("canvas.lens-map-over")
    page.keyboard.press("ArrowDown")
    label = page.get_attribute("canvas.lens-map-over", "aria-label")
    assert "rank 1" in label
    assert "step 59" in label
    page.keyboard.press("Enter")
    page.wait_for_function("() => location.search === '?rank=1'")


def test_the_verdict_comes_first_and_arrives_by_itself(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}")
    page.wait_for_selector("#verdict[data-status='insufficient']")
    server.judge(run, synthetic.healthy(run, 59), synthetic.ledger(59))
    page.wait_for_selector("#verdict[data-status='healthy']")
    says(page, "#verdict h2", "Nothing holds this run back.")
    assert page.locator("#findings").is_hidden()
    server.judge(run, synthetic.slow_device(run, 59, onset=40), synthetic.ledger(59, waiting=0.21))
    page.wait_for_selector("#verdict[data-status='degraded']")
    for part in (
        "Rank 2 (host1/gpu0) computes slower than its peers since step 40.",
        "38.4 % longer",
        "confidence 94 %",
        "What to do Take host1/gpu0 out of the job",
        "SM clock of rank 2 990 MHz instead of 1 980 MHz (−50 %)",
        "Hot expert: milliseconds per token rose",
        "Shared card: less likely, confidence 4.0 %",
        "42.4 ms instead of 58.7 ms",
        "Judged without: net.rdma.retransmits",
    ):
        says(page, "#verdict", part)
    says(page, "#ledger", "Waiting for the slowest rank idle inside a collective until the last rank joins 21 %")
    says(page, "#ledger", "Not measured in this run: garbage collection, pipeline bubble")


def test_all_findings_are_listed_and_lead_to_where_they_show(server: Server, open_page: Open, run: str) -> None:
    server.judge(run, synthetic.several(59), synthetic.ledger(59))
    page = open_page(server, f"/run/{run}")
    rows = page.locator("#findings tbody tr")
    rows.nth(2).wait_for()
    first, over, note = (re.sub(r"\s+", " ", rows.nth(row).inner_text()) for row in range(3))
    assert (
        "▲ warning Rank 2 (host1/gpu0) computes slower than its peers. or, less likely: Shared card (4.0 %)"
        in first
    )
    assert "40 44 not over 16.3 ms (38.4 %) 94 % Hardware" in first
    assert "Rank 1 (host0) waits for its own data loader. 12 17 30 n/a 81 %" in over
    assert "ⓘ note Cards of different speed wait for each other. 0 8 not over n/a" in note
    says(page, "#verdict h2", "Rank 2 (host1/gpu0) computes slower")  # a note is not the verdict
    drawn(page, "step-time", 59)
    page.click("#findings a:text-is('Ranks: time in data')")
    drawn(page, "rank-map", 59)
    page.wait_for_url(f"{server.url}/run/{run}/ranks?rank=1&m=phase.duration:data")


def test_a_note_alone_raises_no_alarm(server: Server, open_page: Open, run: str) -> None:
    reply = synthetic.several(59)
    server.judge(run, {**reply, "status": "healthy", "hypotheses": reply["hypotheses"][-1:]}, synthetic.ledger(59))
    page = open_page(server, f"/run/{run}/hardware")
    page.wait_for_selector("#hardware-grid [data-device='host0/gpu0']")
    assert "▲" not in text(page, "#hardware-grid")
    page.keyboard.press("g")
    page.keyboard.press("o")
    page.wait_for_selector("#verdict[data-status='healthy']")
    says(page, "#findings", "ⓘ note")


def test_what_is_chosen_is_in_the_address(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}/ranks", fresh=True)
    drawn(page, "rank-map", 59)
    page.select_option("#metric", "phase.duration:forward")
    page.fill("#rank-filter", "3, 1")
    page.press("#rank-filter", "Enter")
    page.evaluate("document.activeElement.blur()")  # keys typed into a field are the field's
    page.keyboard.press("+")
    page.keyboard.press("g")
    page.keyboard.press("s")
    drawn(page, "step-stack", 40)
    page.click("button:text-is('▶')")
    page.wait_for_function("() => location.search === '?x=15-44&rank=3,1&m=phase.duration:forward&step=45'")
    address = page.evaluate("() => location.href")
    page.keyboard.press("g")
    page.keyboard.press("r")
    says(page, "#rank-series .lens-panel-legend", "rank 3")
    assert page.input_value("#metric") == "phase.duration:forward"
    assert page.input_value("#rank-filter") == "3,1"
    says(page, "#status", "only steps 15–44")
    press(page, "rank-series", "Table")
    page.wait_for_selector("#rank-series tbody th")
    steps = page.eval_on_selector_all("#rank-series tbody th", "cells => cells.map(cell => Number(cell.innerText))")
    assert (min(steps), max(steps)) == (15, 44)
    page.go_back()
    page.wait_for_selector("#page-steps:not([hidden])")
    page.wait_for_url(address)


def test_zoom_by_dragging_and_by_keys(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}")
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
    page = open_page(server, f"/run/{run}", scheme, fresh=True)
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


def test_what_never_came_to_the_store_is_counted_in_the_header(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}")
    page.wait_for_selector("#status [data-state='live']")
    assert page.query_selector(".lens-missing-records") is None
    drops = {"lost_slots": 700, "given_up": 30, "rejected": 4}
    server.post("/api/v1/runs", json.dumps({**synthetic.run_object(run, 4), "drops": drops}).encode())
    says(page, "#status", "734 records missing")
    title = page.get_attribute(".lens-missing-records", "title")
    assert [count in title for count in ("700 overwritten", "30 given up", "4 refused")] == [True] * 3


def test_a_silent_run_is_called_stale_and_its_pictures_fade(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}")
    page.wait_for_selector("#status [data-state='live']")
    opacity = "Number(getComputedStyle(document.querySelector('#step-time canvas')).opacity)"
    page.wait_for_function(f"() => {opacity} === 1")
    with server.later(60):
        page.wait_for_selector("#status [data-state='stale']")
        page.wait_for_function(f"() => {opacity} < 1")
        says(page, "#status", "▲ 0 of 4 ranks")
        page.wait_for_function("() => /data 6\\d s old/.test(document.querySelector('#status').innerText)")
    page.wait_for_selector("#status [data-state='live']")


def test_an_ended_run_is_called_ended(server: Server, open_page: Open, run: str) -> None:
    server.post("/api/v1/runs", json.dumps({"run": run, "state": "ended"}).encode())
    with server.later(60):
        page = open_page(server, f"/run/{run}")
        page.wait_for_selector("#status [data-state='ended']")
        drawn(page, "step-time", 59)
        says(page, "#numbers", "run ended · 4 ranks")


def test_missing_values_are_named_and_never_zero(server: Server, open_page: Open) -> None:
    name = f"bare-{next(NUMBERS)}"
    server.begin(name)
    page = open_page(server, f"/run/{name}")
    page.wait_for_selector("#step-time .lens-message:has-text('no step has ended yet')")
    says(page, "#numbers", "Step time n/a no step has ended yet")
    says(page, "#verdict", "Waiting for the first step.")
    bare = [{**record, "attrs": {}} for record in synthetic.steps(0, 20) if record.get("kind") == "step"]
    server.send(name, [record for record in bare if record["rank"] != 3])
    drawn(page, "step-time", 19)
    says(page, "#loss .lens-message", "n/a")
    says(page, "#loss .lens-message", 'lens.log({"train.loss": …})')
    says(page, "#tokens .lens-message", "lens.step(tokens=…)")
    says(page, "#status", "▲ 3 of 4 ranks")


def test_where_no_loss_of_the_run_is_reported_that_of_its_ranks_is_shown(server: Server, open_page: Open) -> None:
    name = f"own-losses-{next(NUMBERS)}"
    server.begin(name)
    steps = list(synthetic.steps(0, 20))
    own = [
        {**record, "metric": "train.loss.local", "rank": rank}
        for record in steps if record.get("metric") == "train.loss" for rank in range(4)
    ]  # fmt: skip
    server.send(name, [record for record in steps if record.get("metric") != "train.loss"] + own)
    page = open_page(server, f"/run/{name}")
    drawn(page, "loss", 19)
    says(page, "#loss", "train.loss.local, median rank: the run reports no train.loss")
    says(page, "#numbers", "at the first visible step")


def test_a_run_that_is_only_observed_says_so_where_steps_would_be(server: Server, open_page: Open) -> None:
    name = f"observed-{next(NUMBERS)}"
    about = synthetic.run_object(name, 4) | {"config": {"observed": "from outside"}}
    server.post("/api/v1/runs", json.dumps(about).encode())
    page = open_page(server, f"/run/{name}")
    page.wait_for_selector("#step-time .lens-message:has-text('observed from outside: no phases')")
    says(page, "#numbers", "Step time n/a observed from outside: no phases")
    says(page, "#numbers", "Training loss n/a observed from outside: no phases")
    says(page, "#verdict", "Observed from outside: no phases.")
    assert "no step has ended" not in text(page, "body")


def test_a_loss_that_is_no_number_is_said_and_not_drawn(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}")
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
    page = open_page(server, "/")
    page.click("a.lens-button")
    page.wait_for_url(f"{server.url}/run/{run}")
    drawn(page, "step-time", 59)
    page.keyboard.press("g")
    page.keyboard.press("l")
    page.wait_for_selector("#page-runs:not([hidden]) table")


def test_help_says_what_the_open_page_shows(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}/ranks")
    drawn(page, "rank-map", 59)
    page.keyboard.press("?")
    says(page, "dialog[open]", "This page: Ranks One row a rank, one column a step")
    says(page, "dialog[open]", "Every rank, every step. Brighter is more")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")


def test_a_single_slow_step_stays_visible_when_steps_share_a_column(server: Server, open_page: Open) -> None:
    name = f"long-{next(NUMBERS)}"
    server.begin(name, ranks=2)
    records = [record for record in synthetic.steps(1, 3001, ranks=2) if record.get("kind") == "step"]
    slow = next(record for record in records if record["rank"] == 1 and record["step"] == 1777)
    slow["t1_ns"] += 10**9
    server.send(name, records)
    page = open_page(server, f"/run/{name}/ranks")
    drawn(page, "rank-map", 3000)
    says(page, "#rank-map .lens-panel-legend", "each column: the highest of 3 steps")
    press(page, "rank-map", "Table")
    page.wait_for_selector("#rank-map tbody tr")
    assert "1.04 s" in text(page, "#rank-map tbody tr:nth-child(2)") or "1.05 s" in text(
        page, "#rank-map tbody tr:nth-child(2)"
    )


def test_a_page_weighs_less_than_two_megabytes(server: Server, open_page: Open, run: str) -> None:
    page = open_page(server, f"/run/{run}")
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
    page = open_page(server, f"/run/{run}", script=note_sockets)
    drawn(page, "step-time", 59)
    page.wait_for_selector("#status [data-state='live']")
    page.evaluate(CUT_AND_SEEN)
    server.send(run, synthetic.steps(60, 70))
    drawn(page, "step-time", 69)
    page.wait_for_selector("#status [data-state='live']")
    assert "cursor=" in page.evaluate("() => window.sockets.at(-1).url")
    press(page, "step-time", "Table")
    page.wait_for_selector("#step-time tbody th:text-is('60')")


def test_an_empty_store_names_the_command_that_fills_it_and_the_server_stops_while_a_page_is_open(
    browser: Any,
) -> None:
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    with Running(fake_store.create_app(fake_store.Clock())) as running:
        server = Server(running.url)
        page = context.new_page()
        page.goto(running.url)
        page.wait_for_selector("#runs-list code:text-is('lens demo')")
        says(page, "#runs-list", "lens run -- torchrun train.py")
        server.begin("moe")
        server.send("moe", synthetic.steps(0, 5))
        page.click("#runs-list a.lens-button")
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
    page = open_page(server, f"/run/{run}/nonsense")
    page.wait_for_selector("#notice:has-text('There is no such page')")
