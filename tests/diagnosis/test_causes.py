"""Causes beyond a slow rank: pauses, checkpoints, leaks, routers, makes of cards; each with its look-alikes."""

from __future__ import annotations

import pytest
from cluster import START_NS, Cluster, Fault
from helpers import built, first, verdict

from lens.diagnosis import diagnose
from lens.tables import Tables

MIB = 1024 * 1024


@pytest.mark.parametrize("noise", ["quiet", "shared", "collected"])
def test_collections_of_one_rank_are_found_in_the_mean(noise: str) -> None:
    reply = verdict(Cluster(ranks=8, noise=noise, seed=4, faults=(Fault("gc", (5,), 40, 0.1),)))
    assert first(reply) == ("python_gc", [5])
    assert abs(reply["hypotheses"][0]["onset_step"] - 42) <= 6


def test_collections_of_all_ranks_alike_are_planned() -> None:
    everyone = Fault("gc", tuple(range(8)), 0, 0.06)
    assert verdict(Cluster(ranks=8, faults=(everyone,)))["status"] == "healthy"


def test_a_save_that_is_long_for_a_collection_within_it_says_nothing_of_storage() -> None:
    reply = verdict(Cluster(ranks=8, steps=178, checkpoint_every=25, faults=(Fault("gc", (5,), 30, 0.5),)))
    assert [(item["cause"], item["ranks"]) for item in reply["hypotheses"]] == [("python_gc", [5])]


@pytest.mark.parametrize(("stopped", "said"), [(0.8, []), (0.1, [("checkpoint_stall", [5])])])
def test_a_save_that_is_long_for_a_quota_says_nothing_of_storage(
    stopped: float, said: list[tuple[str, list[int]]]
) -> None:
    cluster = Cluster(ranks=8, steps=178, checkpoint_every=25, faults=(Fault("checkpoint", (5,), 40, 6.0),))
    tables = cluster.tables()
    last = int(tables.steps["t1_ns"].max())
    counted = built(*(
        {"type": "sample", "metric": "container.cpu.throttled.time", "rank": 5, "t_ns": t_ns,
         "value": stopped * (t_ns - START_NS) / 1e9}
        for t_ns in range(START_NS, last, 1_000_000_000)
    ))  # fmt: skip
    mine = tables.samples["metric"] != tables.code("container.cpu.throttled.time")
    tables.samples = tables.select("samples", mine)
    reply = diagnose(cluster.run(), Tables.concat([tables, counted]))
    assert [(item["cause"], item["ranks"]) for item in reply["hypotheses"]] == said


@pytest.mark.parametrize("steps", [176, 179, 182])
def test_a_pause_in_the_newest_step_does_not_hide_those_before_it(steps: int) -> None:
    reply = verdict(Cluster(ranks=8, steps=steps, faults=(Fault("gc", (5,), 30, 0.5),)))
    assert first(reply) == ("python_gc", [5])


@pytest.mark.parametrize("ranks", [(2,), (0, 1, 2, 3, 4, 5, 6, 7)], ids=["one", "all"])
def test_checkpoints_that_grew_name_who_writes_slowly(ranks: tuple[int, ...]) -> None:
    cluster = Cluster(
        ranks=8, noise="shared", seed=3, checkpoint_every=25, faults=(Fault("checkpoint", ranks, 60, 6.0),)
    )
    reply = verdict(cluster)
    assert first(reply) == ("checkpoint_stall", list(ranks))
    found = reply["hypotheses"][0]
    now, fixed = cluster.step_seconds(False)[74:].mean(), cluster.step_seconds(True)[74:].mean()
    assert found["onset_step"] == 74
    assert found["slowdown_pct"] == pytest.approx(100 * (now / fixed - 1), rel=0.25)


def test_a_rank_that_always_saves_slowly_is_compared_with_its_peers() -> None:
    reply = verdict(Cluster(ranks=8, checkpoint_every=20, faults=(Fault("checkpoint", (6,), 0, 4.0),)))
    assert first(reply) == ("checkpoint_stall", [6])


def test_a_leak_is_named_with_the_time_that_is_left_and_costs_nothing_yet() -> None:
    reply = verdict(Cluster(ranks=8, steps=300, faults=(Fault("leak", (3,), 100, 1.5 * MIB),)))
    found = reply["hypotheses"][0]
    assert (found["cause"], found["ranks"], found["slowdown_pct"]) == ("memory_leak_host", [3], None)
    assert abs(found["onset_step"] - 100) <= 40
    assert reply["status"] == "degraded"


def test_a_leak_whose_pages_take_time_is_one_finding_with_that_cost() -> None:
    faults = (Fault("leak", (3,), 100, 1.5 * MIB), Fault("between", (3,), 200, 0.4))
    (found,) = verdict(Cluster(ranks=8, steps=300, faults=faults))["hypotheses"]
    assert (found["cause"], found["ranks"]) == ("memory_leak_host", [3])
    assert found["slowdown_pct"] > 5


def test_memory_that_fills_up_once_is_no_leak() -> None:
    assert verdict(Cluster(ranks=8, steps=300, seed=2))["hypotheses"] == []


def test_owners_of_hot_experts_are_named_together_in_noise_that_hides_each() -> None:
    fault = Fault("hot_expert", (1, 3), 50, 1.5)
    reply = verdict(Cluster(ranks=4, ep=2, noise="shared", seed=8, faults=(fault,)))
    assert first(reply) == ("hot_expert", [1, 3])
    assert reply["hypotheses"][0]["component"].startswith("layer")


@pytest.mark.parametrize("noise", ["quiet", "shared", "drifting"])
def test_makes_that_differ_since_the_start_are_told_and_nobody_is_blamed(noise: str) -> None:
    reply = verdict(Cluster(ranks=16, hosts=4, noise=noise, vendors={"H200": 1.0, "MI400": 1.5}))
    assert (reply["status"], [(h["cause"], h["ranks"], h["severity"]) for h in reply["hypotheses"]]) == (
        "healthy", [("mixed_vendor_imbalance", [], "info")],
    )  # fmt: skip
