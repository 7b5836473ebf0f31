"""What hits a whole host, a whole stage or every rank at once: there is hardly anybody left to compare with."""

from __future__ import annotations

from typing import Any

import pytest

from lens.diagnosis import diagnose
from sample_runs.cluster import Cluster, Fault, Layout, simulate

ONE_HOST, TWO_HOSTS, TWO_STAGES = Layout(8, ep=4), Layout(16, ep=4, tp=2), Layout(16, ep=4, pp=2)


def judged(layout: Layout, fault: Fault | None, noise: str = "clean", **more: Any) -> list[dict[str, Any]]:
    """The hypotheses of a simulated run."""
    faults = () if fault is None else (fault,)
    cluster = Cluster(layout, 100, noise, faults, 3, **more)
    reply = diagnose(cluster.run(), simulate(cluster).tables)
    found: list[dict[str, Any]] = reply["hypotheses"]
    return found


@pytest.mark.parametrize("layout", [ONE_HOST, TWO_HOSTS, TWO_STAGES], ids=["all", "half", "stage"])
@pytest.mark.parametrize("name", ["power_cap", "host_swap"])
def test_a_host_is_named_where_most_of_its_like_are_as_slow(layout: Layout, name: str) -> None:
    (found,) = judged(layout, Fault(name, 45, 5), "spiky")
    assert (found["cause"], found["ranks"]) == (name, list(range(8)))
    assert found["component"] == "host0"
    assert abs(found["onset_step"] - 45) <= 4


def test_one_slow_card_of_a_small_host_is_not_the_host() -> None:
    assert [(f["cause"], f["ranks"]) for f in judged(ONE_HOST, Fault("thermal_throttle", 45, 5))] == [
        ("thermal_throttle", [5])
    ]


def test_a_collapsed_router_comes_before_the_hot_owners_that_it_makes_and_at_their_price() -> None:
    (found,) = judged(TWO_STAGES, Fault("router_collapse", 45, 0, 0.8), "shared_host")
    assert (found["cause"], found["ranks"]) == ("router_collapse", [])
    assert found["slowdown_pct"] > 20


def test_uneven_lengths_are_told_where_noise_hides_half_of_them() -> None:
    first = judged(Layout(16, ep=4), Fault("variable_sequence_length", 45, 0, 0.6), "shared_host")[0]
    assert (first["cause"], first["ranks"]) == ("variable_sequence_length", [])


def test_stages_that_never_wait_for_their_sends_hide_no_slow_rank() -> None:
    (found,) = judged(TWO_STAGES, Fault("slow_device", 45, 3, 1.5), unwaited=True)
    assert (found["cause"], found["ranks"]) == ("slow_device", [3])


def test_delays_of_many_ranks_are_information_and_nobody_is_blamed() -> None:
    cluster = Cluster(Layout(64, ep=8), 70, "clean", (Fault("jitter_amplification", 0),), 3)
    reply = diagnose(cluster.run(), simulate(cluster).tables)
    (found,) = reply["hypotheses"]
    assert (reply["status"], found["cause"], found["ranks"]) == ("healthy", "jitter_amplification", [])
    assert found["slowdown_pct"] > 10
