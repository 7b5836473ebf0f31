"""What is wrong with a card or with its way to the host, and what only looks like it."""

from __future__ import annotations

import pytest
from cluster import Cluster, Fault
from helpers import first, verdict

QUIET_TO_SHARED = ["quiet", "spiky", "shared"]


@pytest.mark.parametrize("noise", QUIET_TO_SHARED)
@pytest.mark.parametrize(
    ("kind", "cause", "strength"),
    [
        ("ecc", "ecc_remap", 1.2), ("ecc", "ecc_remap", 1.8), ("shared", "shared_device", 1.5),
        ("shared", "shared_device", 2.2), ("unknown", "unexplained", 2.2), ("brake", "power_brake", 2.0),
    ],
)  # fmt: skip
def test_equal_slowness_is_told_apart_by_what_the_card_reports(
    noise: str, kind: str, cause: str, strength: float
) -> None:
    reply = verdict(Cluster(ranks=8, seed=3, noise=noise, faults=(Fault(kind, (5,), 50, strength),)))
    assert first(reply) == (cause, [5])
    assert {item["cause"] for item in reply["hypotheses"] if item["finding"] > 0} == set()


@pytest.mark.parametrize("xids", [True, False], ids=["reported", "counted"])
def test_failing_memory_is_an_event_before_it_costs_anything(xids: bool) -> None:
    reply = verdict(Cluster(ranks=8, xids=xids, faults=(Fault("ecc", (2,), 60, 1.0),)))
    (found,) = reply["hypotheses"]
    assert (found["cause"], found["ranks"], found["slowdown_pct"]) == ("ecc_remap", [2], None)
    assert abs(found["onset_step"] - 60) <= 35
    assert reply["status"] == "degraded"


@pytest.mark.parametrize("noise", QUIET_TO_SHARED)
@pytest.mark.parametrize("strength", [4.0, 8.0])
@pytest.mark.parametrize(("kind", "cause"), [("pcie", "pcie_downgrade"), ("copies", "h2d_blocking")])
def test_slower_copies_are_the_links_fault_where_it_lost_lanes(
    noise: str, strength: float, kind: str, cause: str
) -> None:
    cluster = Cluster(ranks=8, seed=5, noise=noise, copies=0.08, faults=(Fault(kind, (6,), 40, strength),))
    assert first(verdict(cluster)) == (cause, [6])


def test_a_link_that_never_had_its_lanes_is_compared_with_like_cards() -> None:
    cluster = Cluster(ranks=8, copies=0.08, faults=(Fault("pcie", (6,), 0, 5.0),))
    assert first(verdict(cluster)) == ("pcie_downgrade", [6])


def test_lost_lanes_and_another_process_that_cost_nothing_are_no_finding() -> None:
    cluster = Cluster(ranks=8, copies=0.02, faults=(Fault("pcie", (6,), 40, 1.0), Fault("shared", (2,), 40, 1.0)))
    assert verdict(cluster)["hypotheses"] == []


@pytest.mark.parametrize("kind", ["power_cap", "thermal", "brake"])
def test_counters_of_throttled_time_say_what_the_bits_say(kind: str) -> None:
    causes = {"power_cap": "power_cap", "thermal": "thermal_throttle", "brake": "power_brake"}
    cluster = Cluster(ranks=8, throttle_counters=True, faults=(Fault(kind, (5,), 50, 1.4),))
    assert first(verdict(cluster)) == (causes[kind], [5])


def test_a_lower_limit_is_a_cap_where_every_card_runs_into_its_limit_anyway() -> None:
    cluster = Cluster(ranks=8, capped=True, faults=(Fault("lower_limit", (5,), 50, 1.4),))
    assert first(verdict(cluster)) == ("power_cap", [5])
