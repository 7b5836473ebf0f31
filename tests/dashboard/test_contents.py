"""What the pages beside Overview and Ranks say of a run whose answer is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.dashboard import full_run
from tests.dashboard.conftest import RealServer
from tests.dashboard.reading import colours, drawn, says, tabled, text

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("dashboard")]
Open = Callable[..., Any]


@pytest.fixture(scope="session")
def run(real: RealServer) -> str:
    """A run of 20 steps that stands still."""
    return real.begin_full(20)


def pointed(page: Any, panel: str, presses: int) -> str:
    """What the tip of a canvas says after so many presses of the right arrow."""
    page.focus(f"#{panel} canvas.lens-map-over")
    for _ in range(presses):
        page.keyboard.press("ArrowRight")
    return text(page, f"#{panel} .lens-tip")


def test_a_click_on_the_stack_shows_that_step_rank_by_rank(real: RealServer, open_page: Open, run: str) -> None:
    page = open_page(real, f"/run/{run}/steps")
    drawn(page, "step-stack", 19)
    drawn(page, "step-lanes", 0)
    says(page, "#step-stack .lens-panel-legend", "forward 20.0 ms backward 25.0 ms between phases 5.00 ms")
    box = page.locator("#step-stack .u-over").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 60)
    page.wait_for_function("() => /^\\?step=(9|10)$/.test(location.search)")
    step = int(page.evaluate("() => location.search").rsplit("=", 1)[1])
    page.wait_for_selector(f"#step-lanes[data-drawn-step='{step}']")
    assert colours(page, "#step-lanes canvas.lens-map") > 5


def test_lanes_say_who_waits_for_whom(real: RealServer, open_page: Open, run: str) -> None:
    page = open_page(real, f"/run/{run}/steps?step=7")
    drawn(page, "step-lanes", 7)
    # Ranks 0, 1 and 3 wait 6 ms in the all-reduce, rank 3 waits 6 ms more in its all-to-all.
    says(page, "#step-lanes .lens-panel-legend", "most waited for: rank 2, 24.0 ms in all by ranks 0, 1 and 3")
    assert "waited 6.00 ms for rank 2" in pointed(page, "step-lanes", 4)
    rows = tabled(page, "step-lanes")
    assert "all_to_all" in rows
    assert "0.006" in rows


LATE_RUN_OBJECT = """
const ask = window.fetch;
window.fetch = async (what, ...more) => {
  const { pathname } = new URL(what.url ?? what, location);
  if (/[/]runs[/][^/]+$/.test(pathname)) await new Promise((done) => setTimeout(done, 1500));
  return ask(what, ...more);
};
"""


@pytest.mark.parametrize("script", ["", LATE_RUN_OBJECT], ids=["at once", "groups known late"])
def test_a_collective_without_all_its_ranks_has_no_known_wait(
    real: RealServer, open_page: Open, script: str
) -> None:
    name = real.begin_full()
    real.send(name, (record for record in full_run.records(0, 3) if record.get("rank") != 2))
    page = open_page(real, f"/run/{name}/steps?step=1", script=script)
    drawn(page, "step-lanes", 1)
    says(page, "#step-lanes .lens-panel-legend", "waiting not known: a rank is not recorded")
    assert "most waited for" not in text(page, "#step-lanes .lens-panel-legend")
    assert "waiting n/a: one rank of the group not recorded" in pointed(page, "step-lanes", 4)


def test_a_collective_in_flight_beside_other_work_is_no_wait(real: RealServer, open_page: Open) -> None:
    """Both ranks start it at 5 ms. Rank 0 works until 30 and waits until rank 1 has come at 36; rank 1 never waits."""
    name, begin = real.begin_full(), time.time_ns()
    ep = {"group": "ep/0", "seq": 1, "bytes": 64, "async": True}
    for rank, enqueued, blocked in ((0, 5, 30), (1, 36, None)):
        where = {"rank": rank, "step": 0}
        wait = {} if blocked is None else {"t_wait_ns": begin + blocked * full_run.MS}
        spans = [
            full_run.span(where, "step", "step", begin, 0, 50),
            full_run.span(where, "phase", "backward", begin, 0, 50),
            full_run.span(where, "collective", "all_reduce", begin, enqueued, 40, {**ep, **wait}),
        ]
        real.send(name, spans)
    page = open_page(real, f"/run/{name}/steps?step=0")
    drawn(page, "step-lanes", 0)
    says(page, "#step-lanes .lens-panel-legend", "in flight beside other work")
    says(page, "#step-lanes .lens-panel-legend", "most waited for: rank 1, 6.00 ms in all by rank 0")
    tip = pointed(page, "step-lanes", 2)
    assert "beside other work for 25.0 ms, then its rank waited for it" in tip
    assert "waited 6.00 ms for rank 1" in tip
    assert "its rank never waited for it" in pointed(page, "step-lanes", 2)


def test_communication_shows_pairs_and_groups(real: RealServer, open_page: Open, run: str) -> None:
    page = open_page(real, f"/run/{run}/communication")
    drawn(page, "wait-map", 19)
    drawn(page, "byte-map", 19)
    says(page, "#communication-numbers", "Most waited for rank 2")
    says(page, "#communication-numbers", "32.0 KiB a step, all ranks together")
    says(page, "#group-speed table.lens-plain-table", "ep/0 0 and 1 all-to-all 1 4.00 KiB")
    waits = tabled(page, "wait-map")
    assert "rank 0 rank 2 0.006" in waits
    assert "rank 0 rank 0 n/a" in waits
    # An all-reduce over 4 ranks gives each peer twice a quarter of the buffer, an all-to-all over 2 half of it.
    sent = tabled(page, "byte-map")
    assert "rank 0 rank 1 4096" in sent
    assert "rank 0 rank 2 2048" in sent


def test_communication_follows_the_visible_steps(real: RealServer, open_page: Open, run: str) -> None:
    page = open_page(real, f"/run/{run}/communication?x=4-8")
    drawn(page, "wait-map", 8)
    says(page, "#wait-map .lens-panel-legend", "mean of 5 steps (4–8)")
    page.keyboard.press("0")
    says(page, "#wait-map .lens-panel-legend", "mean of 20 steps (0–19)")


def test_experts_show_load_imbalance_cost_and_drops(real: RealServer, open_page: Open, run: str) -> None:
    page = open_page(real, f"/run/{run}/experts")
    drawn(page, "expert-map", 19)
    drawn(page, "expert-drops", 19)
    says(page, "#experts-numbers", "layer 1, expert 3 80.0 tokens a step, 2.50 × the even share")
    says(page, "#experts-numbers", "Tokens dropped 13 %")
    # Only rank 3 waits in its all-to-all, 6 ms: the mean of four ranks.
    says(page, "#experts-numbers", "Waiting in exchanges 1.50 ms")
    says(page, "#expert-imbalance .lens-panel-legend", "layer 0 1.00 layer 1 2.50")
    says(page, "#expert-evenness .lens-panel-legend", "layer 0 1.00")
    says(page, "#expert-drops .lens-panel-legend", "layer 0 0 % layer 1 25.0 %")
    assert "layer 1 3 80" in tabled(page, "expert-map")


def test_hardware_shows_cards_of_both_vendors_and_why_a_value_is_missing(
    real: RealServer, open_page: Open, run: str
) -> None:
    page = open_page(real, f"/run/{run}/hardware")
    page.wait_for_selector("#hardware-grid [data-device='host1/gpu1']")
    says(page, "#hardware-grid .lens-panel-legend", "2 hosts, 4 cards: 2 × NVIDIA H200, 2 × AMD MI455X")
    says(page, "#hardware-grid .lens-panel-legend", "All of these cards are simulated")
    first, last, port = (
        f"#hardware-grid [data-device='{name}']" for name in ("host0/gpu0", "host1/gpu1", "host0/mlx5_0")
    )
    says(page, first, "gpu0 rank 0 simulated NVIDIA H200 Busy 50 %")
    says(page, first, "319 W of 600 W")
    says(page, last, "Power n/a: unsupported by this card")
    says(page, last, "Temperature n/a: not reported")
    says(page, port, "simulated ● up 50.0 GB/s 500 MB/s (1.0 %) 1.00 GB/s (2.0 %)")
    assert "host1/gpu1 simulated hw.power n/a: unsupported by this card" in tabled(page, "hardware-grid")


def test_memory_is_held_against_the_limit_of_its_own_card(real: RealServer, open_page: Open, run: str) -> None:
    page = open_page(real, f"/run/{run}/memory")
    drawn(page, "device-memory", 18)
    drawn(page, "process-memory", 18)
    # All cards hold 4 GiB, those of host1 have twice the memory.
    says(page, "#device-memory .lens-panel-legend", "limit 8.00 GiB")
    says(
        page,
        "#device-memory .lens-panel-legend",
        "fullest: host0/gpu0, rank 0, at most 4.00 GiB of 8.00 GiB (50 %)",
    )
    says(page, "#process-memory .lens-panel-legend", "on rank 3; limit n/a: not reported")
    says(page, "#torch-memory .lens-message", "n/a: torch has no allocator statistics here")


LATE_MAPS = """
const ask = window.fetch;
window.fetch = async (what, ...more) => {
  if (String(what.url ?? what).includes("/heatmap")) await new Promise(() => {});
  return ask(what, ...more);
};
"""


def test_memory_is_drawn_over_all_steps_before_any_map_of_them_has_come(
    real: RealServer, open_page: Open, run: str
) -> None:
    page = open_page(real, f"/run/{run}/memory", script=LATE_MAPS)
    drawn(page, "device-memory", 18)
    rows = page.locator("#device-memory .lens-table tbody tr")
    tabled(page, "device-memory")
    assert rows.count() == 20


def test_ranks_show_own_time_where_collectives_are_known(real: RealServer, open_page: Open, run: str) -> None:
    """Rank 2 comes late: it is held up for 8 ms of 50 where ranks 0 and 1 are for 20."""
    page = open_page(real, f"/run/{run}/ranks")
    drawn(page, "rank-map", 19)
    says(page, "#rank-map .lens-panel-legend", "own time")
    says(page, "#rank-series .lens-panel-legend", "rank 2 42.0 ms")
    assert page.input_value("#metric") == "step.self"
    assert "0 host0/gpu0 30.0 ms" in tabled(page, "rank-map")
