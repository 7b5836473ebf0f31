"""What holds of every page: it draws what arrives, keeps its address, says in words and files what its pictures
show, names what is missing, and can be used by everyone."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import pytest

from tests.dashboard import full_run, synthetic
from tests.dashboard.conftest import RealServer, Server
from tests.dashboard.reading import (
    PAGES,
    PageCase,
    changed,
    content,
    downloaded,
    drawn,
    says,
    settled,
    tabled,
)

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("dashboard")]
Open = Callable[..., Any]
each_page = pytest.mark.parametrize("case", PAGES, ids=lambda case: case.name)
SHOWN = """() => { const words = selector => [...document.querySelectorAll(`[data-page]:not([hidden]) ${selector}`)]
    .map(each => each.innerText);
    return { address: location.href, scheme: document.documentElement.dataset.mantineColorScheme,
        fields: [...document.querySelectorAll('[data-page]:not([hidden]) :is(input, select)')].map(each => each.value),
        legends: words('.lens-panel-legend'), chips: words('.lens-controls .lens-chip') }; }"""


@pytest.fixture(scope="session")
def run(real: RealServer) -> str:
    """A run of 20 steps that stands still."""
    return real.begin_full(20)


@each_page
def test_it_draws_what_arrives_while_it_is_open(real: RealServer, open_page: Open, case: PageCase) -> None:
    name = real.begin_full(20)
    page = open_page(real, f"/run/{name}{case.path}")
    settled(page, case)
    before = {panel: content(page, panel) for panel in case.panels}
    real.send(name, full_run.records(20, 40))
    for panel, shown in before.items():
        changed(page, panel, shown)
    assert "plotly" not in " ".join(page.watched.requests)


@each_page
def test_every_picture_has_a_table_and_files_of_the_visible_steps(
    real: RealServer, open_page: Open, run: str, case: PageCase
) -> None:
    page = open_page(real, f"/run/{run}{case.path}?x=5-12&step=7")
    settled(page, case)
    for panel in case.pictures:
        name, picture = downloaded(page, panel, "PNG")
        assert name == f"{run}-{panel}.png"
        assert picture.startswith(b"\x89PNG")
    for panel in case.panels:
        name, table = downloaded(page, panel, "CSV")
        assert name == f"{run}-{panel}.csv"
        rows = list(csv.DictReader(io.StringIO(table.decode())))
        assert rows
        if "step" in rows[0]:
            steps = {int(row["step"]) for row in rows}
            assert min(steps) in (5, 6), "a share of counters begins at the second reading"
            assert max(steps) == 12
        assert tabled(page, panel)


def test_every_page_is_reached_by_its_keys_and_restored_by_its_address(
    real: RealServer, open_page: Open, run: str
) -> None:
    state = "?x=3-15&rank=1,3&m=phase.duration:forward&step=7"
    page = open_page(real, f"/run/{run}{state}", fresh=True)
    drawn(page, "step-time", 15)
    page.keyboard.press("d")
    for case in PAGES:
        page.keyboard.press("g")
        page.keyboard.press(case.key)
        settled(page, case)
        before = steady(page)
        assert before["address"] == f"{real.url}/run/{run}{case.path}{state}"
        assert before["scheme"] == "dark"
        page.reload()
        settled(page, case)
        assert steady(page) == before


def steady(page: Any) -> dict[str, Any]:
    """What the open page shows once it no longer changes."""
    page.wait_for_function(
        f"() => {{ const now = JSON.stringify(({SHOWN})()); const same = now === window.shownBefore;"
        " window.shownBefore = now; return same; }",
        polling=500,
    )
    shown: dict[str, Any] = page.evaluate(SHOWN)
    return shown


@pytest.mark.parametrize("case", [case for case in PAGES if case.name != "hardware"], ids=lambda case: case.name)
def test_it_names_what_is_missing(real: RealServer, open_page: Open, case: PageCase) -> None:
    page = open_page(real, f"/run/{real.begin_full()}{case.path}")
    page.wait_for_function(
        """name => { const says = [...document.querySelectorAll(`#page-${name} [data-empty] .lens-message`)];
        return says.length && says.every(each => each.innerText.startsWith('n/a:')); }""",
        arg=case.name,
    )
    says(page, "#status", "… waiting")


@each_page
def test_it_says_how_old_its_data_is_and_how_many_ranks_report(
    real: RealServer, open_page: Open, run: str, case: PageCase
) -> None:
    page = open_page(real, f"/run/{run}{case.path}")
    page.set_viewport_size({"width": 900, "height": 800})
    page.wait_for_selector("#status :text('old')")
    says(page, "#status", "of 4 ranks")
    # Nothing is cut off in a narrow window, once pictures have followed its width.
    page.wait_for_function("() => document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_a_serious_fault_of_accessibility(
    real: RealServer, server: Server, open_page: Open, run: str, scheme: str
) -> None:
    api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")

    def faults(page: Any) -> list[str]:
        found = api.Axe().run(page).response["violations"]
        return [
            f"{each['id']}: {node['target']} {node['failureSummary']}"
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]

    page = open_page(real, f"/run/{run}?rank=1", scheme)
    for case in PAGES:
        page.keyboard.press("g")
        page.keyboard.press(case.key)
        settled(page, case)
        assert faults(page) == [], case.name
        for panel in case.panels:
            tabled(page, panel)
        assert faults(page) == [], f"{case.name}, as tables"
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    assert faults(page) == [], "help"
    page = open_page(real, "/", scheme)
    page.wait_for_selector("#runs-list table")
    assert faults(page) == [], "runs"
    server.begin("faulty")
    server.send("faulty", synthetic.steps(0, 60))
    server.judge("faulty", synthetic.several(59), synthetic.ledger(59))
    page = open_page(server, "/run/faulty", scheme)
    page.wait_for_selector("#findings tbody tr")
    assert faults(page) == [], "a verdict with several findings"
    with server.later(60):
        page.wait_for_selector("#status [data-state='stale']")
        assert faults(page) == [], "stale"
