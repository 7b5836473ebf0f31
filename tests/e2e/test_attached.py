"""A training that runs already: attached to, made slow on one rank, and read in a browser until that rank is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.reading import drawn, tabled
from tests.e2e.harness import Family

pytestmark = [
    pytest.mark.processes, pytest.mark.browser, pytest.mark.timeout(500), pytest.mark.xdist_group("demo"),
]  # fmt: skip
SLOW_RANK = 1
STEPS = 60
"""Steps before something is broken: what is slow is told by what was usual."""
PATIENCE_MS = 150_000


class Attached(Family):
    """A launcher with two ranks, and what `lens attach` starts beside it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "data")
        self.folder = folder
        self.environment = {"LENS_RINGS": str(folder / "rings"), "LENS_DATA": str(self.data)}
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        script = Path(__file__).with_name("unprepared_moe.py")
        self.process = self.start_python(*launcher, str(script), str(folder), str(SLOW_RANK))

    def lens(self, *words: str) -> dict[str, Any]:
        """What a verb says."""
        child = self.start(*words, "--json", **self.environment)
        said, errors = child.communicate(timeout=150)
        assert said, errors
        reply: dict[str, Any] = json.loads(said.splitlines()[-1])
        return reply


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Attached]:
    started = Attached(tmp_path)
    yield started
    started.end()


def test_a_slow_rank_of_a_training_that_ran_already_is_named_on_its_page(attached: Attached, browser: Any) -> None:
    launcher = str(attached.process.pid)
    attached.wait_for(
        lambda: len(attached.lens("attach", "--check", "--all-ranks", launcher)["processes"]) == 2, "two ranks"
    )
    reply = attached.lens("attach", "--all-ranks", launcher, "--wait", "120")
    assert [found["state"] for found in reply["processes"]] == ["watching"] * 2, reply
    run = reply["run"]

    def last_step() -> int:
        return attached.get(f"/api/v1/runs/{run}")["last_step"] or 0

    attached.wait_for(lambda: last_step() >= STEPS, "the first steps")
    (attached.folder / "slow").touch()
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(f"{reply['url']}?token={(attached.data / 'token').read_text().strip()}")
    page.wait_for_function(
        "rank => document.querySelector('#verdict h2')?.innerText.includes(`Rank ${rank}`)", arg=SLOW_RANK
    )
    page.wait_for_selector("#verdict[data-status='degraded']")
    now = last_step()
    page.keyboard.press("g")
    page.keyboard.press("r")
    drawn(page, "rank-map", now)
    assert {line.split()[0] for line in rows(page, "rank-map")} == {"0", "1"}
    page.keyboard.press("g")
    page.keyboard.press("e")
    drawn(page, "expert-map", now)
    assert len(rows(page, "expert-map")) >= 2
    context.close()
    reply = attached.lens("detach", "--all-ranks", launcher, "--wait", "120")
    assert [found["left"] for found in reply["processes"]] == [True, True]
    (attached.folder / "stop").touch()
    _, said = attached.process.communicate(timeout=100)
    assert attached.process.returncode == 0, said
    assert said.count("lens: attached by") == 2


def rows(page: Any, panel: str) -> list[str]:
    """The table beside a picture, row by row."""
    tabled(page, panel)
    found: list[str] = page.locator(f"#{panel} .lens-table tbody tr").all_inner_texts()
    return found
