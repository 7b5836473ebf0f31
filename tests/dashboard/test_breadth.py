"""The pages beside Overview and Ranks on the real store: they draw, name what is missing, keep their address."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from lens.dashboard import mount
from lens.settings import Settings
from lens.store.app import create_app
from tests.dashboard import breadth
from tests.dashboard.conftest import Running, Server
from tests.dashboard.test_pages import colours, drawn, pixels, text
from tests.dashboard.test_real_store import TOKEN, Sender

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("dashboard")]
Open = Callable[..., Any]
NUMBERS = count()
SHOWN = """() => { const shown = [...document.querySelectorAll('[data-page]:not([hidden]) .lens-panel')];
    const words = each => (each.hasAttribute('data-empty') ? each.querySelector('.lens-message').innerText : '');
    return shown.some(each => !words(each)) && !shown.some(each => words(each) === 'Loading…'); }"""


class Real:
    """A server on the real store, and pages that are signed in to it."""

    def __init__(self, server: Server) -> None:
        self.url, self.server, self._send = server.url, server, Sender(server)

    def begin(self) -> str:
        """A run of which nothing has arrived."""
        name = f"run{next(NUMBERS)}"
        self.server.post("/api/v1/runs", json.dumps(breadth.run_object(name)).encode())
        return name

    def send(self, run: str, records: Any) -> None:
        self._send(run, records)

    def page(self, open_page: Open, path: str, **options: Any) -> Any:
        page = open_page(f"{self.url}/?token={TOKEN}", **options)
        page.goto(self.url + path)
        return page


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    folder: Path = tmp_path_factory.mktemp("data")
    app = create_app(Settings.load(data=folder, token=TOKEN))
    mount(app)
    with Running(app) as running:
        yield Real(Server(running.url, {"Authorization": f"Bearer {TOKEN}"}))


@pytest.fixture(scope="module")
def run(real: Real) -> str:
    """A run that has reported 20 steps, and everything else."""
    name = real.begin()
    real.send(name, breadth.steps(0, 20))
    real.send(name, [*breadth.experts(0, 20), *breadth.cards(20)])
    return name


def tabled(page: Any, panel: str) -> str:
    page.click(f"#{panel} .lens-panel-tools button:text-is('Table')")
    page.wait_for_selector(f"#{panel} tbody tr")
    return text(page, f"#{panel} .lens-table")


def test_a_click_on_the_stack_shows_that_step_rank_by_rank(real: Real, open_page: Open, run: str) -> None:
    page = real.page(open_page, f"/run/{run}/steps")
    drawn(page, "step-stack", 19)
    drawn(page, "step-lanes", 0)
    legend = text(page, "#step-stack .lens-panel-legend")
    assert "forward 20.0 ms backward 25.0 ms" in legend
    assert "between phases 5.00 ms" in legend
    box = page.locator("#step-stack .u-over").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 60)
    page.wait_for_function("() => /^\\?step=(9|10)$/.test(location.search)")
    step = int(page.url.rsplit("=", 1)[1])
    page.wait_for_selector(f"#step-lanes[data-drawn-step='{step}']")
    assert colours(page, "#step-lanes canvas.lens-map") > 5


def test_lanes_say_who_waits_for_whom(real: Real, open_page: Open, run: str) -> None:
    page = real.page(open_page, f"/run/{run}/steps?step=7")
    drawn(page, "step-lanes", 7)
    # Ranks 0, 1 and 3 wait 6 ms in the all-reduce, rank 3 waits 6 ms more in its all-to-all.
    assert "most waited for: rank 2, 24.0 ms in all by 0, 1 and 3" in text(page, "#step-lanes .lens-panel-legend")
    page.focus("#step-lanes canvas.lens-map-over")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert "waited 6.00 ms for rank 2" in text(page, "#step-lanes .lens-tip")
    rows = tabled(page, "step-lanes")
    assert "all_to_all" in rows
    assert "0.006" in rows


def test_a_collective_without_all_its_ranks_has_no_known_wait(real: Real, open_page: Open) -> None:
    name = real.begin()
    real.send(name, (record for record in breadth.steps(0, 3) if record["rank"] != 2))
    page = real.page(open_page, f"/run/{name}/steps?step=1")
    drawn(page, "step-lanes", 1)
    assert "most waited for" not in text(page, "#step-lanes .lens-panel-legend")
    page.focus("#step-lanes canvas.lens-map-over")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert "waiting n/a: one rank of the group not recorded" in text(page, "#step-lanes .lens-tip")


def test_communication_shows_pairs_and_groups(real: Real, open_page: Open, run: str) -> None:
    page = real.page(open_page, f"/run/{run}/communication")
    drawn(page, "wait-map", 19)
    drawn(page, "byte-map", 19)
    tiles = text(page, "#communication-numbers")
    assert "Most waited for rank 2" in tiles
    assert "32.0 KiB a step, all ranks together" in tiles
    assert "ep/0 0 and 1 all-to-all 1 4.00 KiB" in text(page, "#group-speed table.lens-plain-table")
    waits = tabled(page, "wait-map")
    assert "rank 0 rank 2 0.006" in waits
    assert "rank 0 rank 0 n/a" in waits
    # An all-reduce over 4 ranks gives each peer twice a quarter of the buffer, an all-to-all over 2 half of it.
    sent = tabled(page, "byte-map")
    assert "rank 0 rank 1 4096" in sent
    assert "rank 0 rank 2 2048" in sent


def test_communication_follows_the_visible_steps(real: Real, open_page: Open, run: str) -> None:
    page = real.page(open_page, f"/run/{run}/communication?x=4-8")
    drawn(page, "wait-map", 8)
    assert "mean of 5 steps (4–8)" in text(page, "#wait-map .lens-panel-legend")
    page.keyboard.press("0")
    drawn(page, "wait-map", 19)
    assert "mean of 20 steps (0–19)" in text(page, "#wait-map .lens-panel-legend")


def test_experts_show_load_imbalance_and_drops(real: Real, open_page: Open, run: str) -> None:
    page = real.page(open_page, f"/run/{run}/experts")
    drawn(page, "expert-map", 19)
    drawn(page, "expert-drops", 19)
    tiles = text(page, "#experts-numbers")
    assert "layer 1, expert 3 80.0 tokens a step, 2.50 × the even share" in tiles
    assert "Tokens dropped 13 %" in tiles
    page.wait_for_selector("#expert-imbalance .lens-panel-legend :text('2.50')")
    assert "layer 0 1.00 layer 1 2.50" in text(page, "#expert-imbalance .lens-panel-legend")
    assert "layer 0 1.00" in text(page, "#expert-evenness .lens-panel-legend")
    assert "layer 0 0 % layer 1 25.0 %" in text(page, "#expert-drops .lens-panel-legend")
    assert "layer 1 3 80" in tabled(page, "expert-map")


def test_hardware_shows_cards_of_both_vendors_and_why_a_value_is_missing(
    real: Real, open_page: Open, run: str
) -> None:
    page = real.page(open_page, f"/run/{run}/hardware")
    page.wait_for_selector("#hardware-grid [data-device='host1/gpu1']")
    assert "2 hosts, 4 cards: nvidia H200, amd MI455X" in text(page, "#hardware-grid .lens-panel-legend")
    first = text(page, "#hardware-grid [data-device='host0/gpu0']")
    assert "rank 0 simulated nvidia · H200 Busy 50 %" in first
    assert "300 W of 600 W" in first
    last = text(page, "#hardware-grid [data-device='host1/gpu1']")
    assert "Power n/a: unsupported by this card" in last
    assert "Temperature n/a: not reported" in last
    assert "host1/gpu1 simulated hw.power n/a: unsupported by this card" in tabled(page, "hardware-grid")


def test_memory_shows_the_limit_and_the_room_below_it(real: Real, open_page: Open, run: str) -> None:
    page = real.page(open_page, f"/run/{run}/memory")
    drawn(page, "device-memory", 18)
    drawn(page, "process-memory", 18)
    legend = text(page, "#device-memory .lens-panel-legend")
    assert "limit 8.00 GiB" in legend
    assert "peak 4.00 GiB on rank 3; 4.00 GiB below the limit" in legend
    assert "limit n/a: not reported" in text(page, "#process-memory .lens-panel-legend")
    assert "n/a: torch has no allocator statistics here" in text(page, "#torch-memory .lens-message")


PAGES = ["steps", "communication", "experts", "hardware", "memory"]
KEYS = {"steps": "s", "communication": "c", "experts": "e", "hardware": "h", "memory": "m"}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_what_is_missing(real: Real, open_page: Open, name: str) -> None:
    if name == "hardware":
        pytest.skip("the run object itself names the cards")
    page = real.page(open_page, f"/run/{real.begin()}/{name}")
    page.wait_for_function(
        """name => { const says = [...document.querySelectorAll(`#page-${name} .lens-panel .lens-message`)];
        return says.length && says.every(each => each.innerText.startsWith('n/a:')); }""",
        arg=name,
    )


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_reached_by_its_keys_and_keeps_its_address(
    real: Real, open_page: Open, run: str, name: str
) -> None:
    page = real.page(open_page, f"/run/{run}?x=3-15&rank=1")
    drawn(page, "step-time", 15)
    page.keyboard.press("g")
    page.keyboard.press(KEYS[name])
    page.wait_for_url(f"{real.url}/run/{run}/{name}?x=3-15&rank=1")
    page.wait_for_function(SHOWN)
    page.reload()
    page.wait_for_function(SHOWN)
    assert page.url == f"{real.url}/run/{run}/{name}?x=3-15&rank=1"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_changes_its_colours_and_loads_no_plotly(real: Real, open_page: Open, run: str, name: str) -> None:
    page = real.page(open_page, f"/run/{run}/{name}", scheme="dark")
    page.wait_for_function(SHOWN)
    before = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("d")
    page.wait_for_function("before => getComputedStyle(document.body).backgroundColor !== before", arg=before)
    assert not [url for url in page.watched.requests if "plotly" in url]


@pytest.mark.parametrize("panel", ["steps/step-lanes", "communication/wait-map", "memory/device-memory"])
def test_a_picture_can_be_saved(real: Real, open_page: Open, run: str, panel: str) -> None:
    path, _, identifier = panel.partition("/")
    page = real.page(open_page, f"/run/{run}/{path}")
    page.wait_for_function(SHOWN)
    assert pixels(page, f"#{identifier} canvas").startswith("data:image/png")
    for kind, begin in (("CSV", b""), ("PNG", b"\x89PNG")):
        content = downloaded(page, identifier, kind)
        assert content.startswith(begin)
        assert len(content) > 100


def downloaded(page: Any, identifier: str, kind: str) -> bytes:
    """What a panel's button saves, once the panel has its data: the frame is drawn before the first reply is there."""
    content = b""
    for _ in range(40):
        with page.expect_download() as saved:
            page.click(f"#{identifier} .lens-panel-tools button:text-is('{kind}')")
        content = saved.value.path().read_bytes()
        if len(content) > 100:
            break
        page.wait_for_timeout(250)
    return content
