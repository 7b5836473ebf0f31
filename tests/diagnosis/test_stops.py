"""Processes that stop and go on, and what makes a step take seconds without that."""

from __future__ import annotations

import pytest
from cluster import Cluster, Fault
from helpers import first, verdict


def stalled(kind: str, rank: int, *steps: int, seconds: float = 6.0, **about: object) -> Cluster:
    """Eight ranks of which one stands still for some seconds in each of these steps."""
    faults = tuple(Fault(kind, (rank,), step, seconds) for step in steps)
    return Cluster(**{"ranks": 8, "steps": 200, "faults": faults, **about})


@pytest.mark.parametrize("noise", ["quiet", "shared", "spiky"])
@pytest.mark.parametrize("seconds", [3.0, 20.0])
@pytest.mark.parametrize("beats_tell", ["state", "silence"])
def test_a_stop_is_named_with_its_rank_and_its_end(beats_tell: str, seconds: float, noise: str) -> None:
    reply = verdict(stalled("stop", 3, 120, seconds=seconds, noise=noise, beats_tell=beats_tell))
    (found,) = reply["hypotheses"]
    assert (found["cause"], found["ranks"], found["onset_step"]) == ("process_stopped", [3], 120)
    assert found["end_step"] == 120
    assert 120 <= found["detected_step"] <= 125


def test_what_repeated_stops_cost_is_what_the_run_takes_without_them() -> None:
    cluster = stalled("stop", 3, 80, 120, 160)
    found = verdict(cluster)["hypotheses"][0]
    now, fixed = cluster.step_seconds(False)[80:].mean(), cluster.step_seconds(True)[80:].mean()
    assert (found["cause"], found["end_step"]) == ("process_stopped", None)
    assert found["slowdown_pct"] == pytest.approx(100 * (now / fixed - 1), rel=0.15)


def test_without_heartbeats_processor_time_that_stands_still_in_the_computing_says_it_less_surely() -> None:
    (found,) = verdict(stalled("stop", 3, 120, heartbeats=False))["hypotheses"]
    assert (found["cause"], found["ranks"]) == ("process_stopped", [3])
    assert found["confidence"] < 0.7


@pytest.mark.parametrize("heartbeats", [True, False])
def test_a_process_that_another_keeps_off_the_processor_was_not_stopped(heartbeats: bool) -> None:
    reply = verdict(stalled("hog", 3, 120, heartbeats=heartbeats))
    assert "process_stopped" not in {item["cause"] for item in reply["hypotheses"]}


def test_a_process_that_waits_and_beats_was_not_stopped() -> None:
    reply = verdict(stalled("io", 3, 120))
    assert "process_stopped" not in {item["cause"] for item in reply["hypotheses"]}


def test_a_slow_loader_is_no_stop() -> None:
    assert first(verdict(Cluster(ranks=8, faults=(Fault("data", (3,), 40, 1.5),)))) == ("slow_dataloader", [3])


def test_long_steps_that_nobody_explains_are_nobodys_stop() -> None:
    reply = verdict(stalled("stop", 3, 120, signals=False))
    assert "process_stopped" not in {item["cause"] for item in reply["hypotheses"]}
