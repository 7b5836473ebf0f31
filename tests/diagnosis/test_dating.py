"""A finding is dated to the first reply that has it, and the search for that reply stays short in a long run."""

from __future__ import annotations

from typing import Any

import pytest

from lens.diagnosis import diagnose
from lens.diagnosis.changes import Change
from lens.diagnosis.examine import Examiner
from lens.diagnosis.grids import NOTICED, STANDING, grid, on_grid
from lens.diagnosis.judge import Judge
from sample_runs.cluster import Cluster, Fault, Layout, simulate

LONG = Cluster(Layout(8, ep=4), 1600, "shared_host", (Fault("slow_device", 800, 1, 1.5),), seed=1)
FAULTS = {"slow_device": 1, "power_cap": 0, "python_gc": 3, "hot_expert": 2, "slow_dataloader": 5}


def first(cluster: Cluster) -> tuple[Any, dict[str, Any]]:
    """The records of a run, and the first hypothesis about it."""
    tables = simulate(cluster).tables
    return tables, diagnose(cluster.run(), tables)["hypotheses"][0]


def test_a_long_run_is_asked_at_few_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    onsets = Judge.onsets

    def counted(judge: Judge, index: int) -> Any:
        asked.append(index)
        return onsets(judge, index)

    monkeypatch.setattr(Judge, "onsets", counted)
    _, found = first(LONG)
    assert (found["cause"], found["ranks"]) == ("slow_device", [1])
    assert 800 <= found["detected_step"] <= 806
    assert len(asked) < 50


def test_a_rank_that_left_its_past_many_times_is_dated(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(Layout(8, ep=4), 200, "shared_host", (Fault("slow_device", 100, 1, 1.5),), seed=2)
    _, usual = first(cluster)
    read = Examiner.of

    def restless(*known: Any) -> Examiner:
        run = read(*known)
        short = (Change(1, place, place + 5, 0.06, 0.05, place + 22, place + 6) for place in range(12, 90))
        run.found["compute"] = [*short, *run.found["compute"]]
        return run

    monkeypatch.setattr(Examiner, "of", restless)
    _, found = first(cluster)
    assert [found[key] for key in ("cause", "ranks", "detected_step")] == [
        usual[key] for key in ("cause", "ranks", "detected_step")
    ]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_reply_before_does_not_hold_it(fault: str) -> None:
    cluster = Cluster(Layout(8, ep=4), 420, "shared_host", (Fault(fault, 300, FAULTS[fault]),), seed=2)
    tables, found = first(cluster)
    key = found["cause"], found["ranks"]

    def holds(step: int) -> bool:
        reply = diagnose(cluster.run(), tables, upto_step=step)
        return key in [(item["cause"], item["ranks"]) for item in reply["hypotheses"]]

    assert found["detected_step"] >= 300
    assert holds(found["detected_step"])
    assert not any(holds(found["detected_step"] - back) for back in (1, 2, 7, 40))


@pytest.mark.parametrize("every", [NOTICED, STANDING])
def test_a_grid_has_few_places_however_long_a_run_is(every: int) -> None:
    assert len(grid(1_000_000, every)) < 500
    assert grid(8 * every, every).tolist() == [every * number - 1 for number in range(1, 9)]
    assert on_grid(every - 2, every) == -1
    assert all(on_grid(place, every) == max(grid(place + 1, every)) for place in (every - 1, 733, 90_001))
