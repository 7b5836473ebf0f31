"""Slow transfers: what became slow, where it sits, and what only looks like it."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import Cluster, Fault
from helpers import first, verdict

from lens.diagnosis import diagnose
from sample_runs.cluster import Cluster as Physical
from sample_runs.cluster import Fault as Loss
from sample_runs.cluster import Layout, simulate

HOST1 = [4, 5, 6, 7]


def wide(*faults: Fault, **about: Any) -> Cluster:
    """Four hosts; expert groups span two hosts each, so that every rank is where two groups of its own cross."""
    return Cluster(**{"ranks": 16, "hosts": 4, "ep": 8, "offsets_s": 0.005, "seed": 4, "faults": faults, **about})


@pytest.mark.parametrize("noise", ["quiet", "spiky", "sequences", "shared"])
@pytest.mark.parametrize("rank", [2, 13])
def test_a_slow_port_is_located_by_the_groups_that_cross_it_alone(noise: str, rank: int) -> None:
    reply = verdict(wide(Fault("link", (rank,), 40, 6.0), noise=noise, signals=False))
    assert first(reply) == ("slow_link", [rank])
    assert reply["status"] == "degraded"


@pytest.mark.parametrize(
    ("fault", "cause", "ranks", "component"),
    [
        (Fault("link", (5,), 40, 6.0), "slow_link", [5], "host1/mlx5_1"),
        (Fault("loss", (5,), 40, 8.0), "lossy_link", [5], "host1/mlx5_1"),
        (Fault("crowded", tuple(range(8)), 40, 4.0), "congestion", list(range(8)), "leaf0"),
        (Fault("crowded", (), 40, 4.0), "congestion", [], None),
        (Fault("fallback", (), 0, 9.0), "transport_fallback", [], None),
        (Fault("quota", (5,), 40, 6.0), "cpu_quota", [5], "host1/mlx5_1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_ports_and_processes_tell_the_causes_apart(
    fault: Fault, cause: str, ranks: list[int], component: str | None
) -> None:
    reply = verdict(wide(fault, ports="rank", hosts_per_switch=2, steps=160))
    assert first(reply) == (cause, ranks)
    assert reply["hypotheses"][0]["component"] == component


def test_slower_small_collectives_alone_are_latency() -> None:
    reply = verdict(wide(Fault("latency", (), 40, 1.5), small=6, ports="rank"))
    assert first(reply) == ("high_latency", [])


def test_slower_groups_within_a_host_alone_are_the_links_between_its_cards() -> None:
    cluster = Cluster(ranks=8, hosts=2, ep=2, seed=3, faults=(Fault("card_link", (5,), 40, 12.0),))
    reply = verdict(cluster)
    assert first(reply) == ("scaleup_link_degraded", [5])
    assert reply["hypotheses"][0]["component"] == "host1/gpu1"


def test_point_to_point_counts_too() -> None:
    reply = verdict(Cluster(ranks=16, hosts=4, stages=4, ep=2, pipe=True, faults=(Fault("link", (9,), 40, 8.0),)))
    assert first(reply) == ("slow_link", [9])


@pytest.mark.parametrize(
    ("link", "other", "causes"),
    [
        (Fault("link", (5,), 40, 6.0), Fault("compute", (5,), 40, 1.6), {"slow_link", "slow_device"}),
        (Fault("link", (5,), 40, 6.0), Fault("quota", (5,), 40, 6.0), {"slow_link", "cpu_quota"}),
    ],
    ids=["link or card", "link or quota"],
)
def test_look_alikes_are_told_apart(link: Fault, other: Fault, causes: set[str]) -> None:
    found = [first(verdict(wide(fault, ports="rank", steps=160))) for fault in (link, other)]
    assert {cause for cause, _ in found} == causes
    assert [ranks for _, ranks in found] == [[5], [5]]


@pytest.mark.parametrize("seed", range(6))
def test_a_process_that_loses_no_more_time_than_ever_is_not_what_slows_its_transfers(seed: int) -> None:
    cluster = Cluster(ranks=4, hosts=2, ep=2, seed=seed, faults=(Fault("link", (seed % 4,), 12, 6.0),))
    assert "cpu_contention" not in {item["cause"] for item in verdict(cluster)["hypotheses"]}


def test_hot_experts_are_no_slow_link() -> None:
    reply = verdict(wide(Fault("hot_expert", (3, 11), 40, 1.6), ports="rank"))
    assert first(reply) == ("hot_expert", [3, 11])
    assert not [item for item in reply["hypotheses"] if "link" in item["cause"]]


def test_a_slow_port_and_a_slow_card_at_once_are_both_named() -> None:
    reply = verdict(wide(Fault("link", (5,), 40, 6.0), Fault("compute", (3,), 70, 1.6), steps=160, ports="rank"))
    assert {(item["cause"], *item["ranks"]) for item in reply["hypotheses"]} == {
        ("slow_link", 5),
        ("slow_device", 3),
    }


def test_the_rank_that_leaves_late_because_of_a_slow_port_elsewhere_is_not_blamed() -> None:
    reply = verdict(wide(Fault("link", (5,), 40, 6.0), ports="rank"))
    assert all(item["ranks"] == [5] for item in reply["hypotheses"])
    assert {"cause": "slow_device"}.items() <= reply["hypotheses"][0]["against"][0].items()


@pytest.mark.parametrize("rank", range(4))
def test_of_two_ranks_the_one_that_has_its_data_sooner_is_behind_the_slow_port(rank: int) -> None:
    cluster = Cluster(ranks=4, hosts=4, ep=2, seed=rank, signals=False, faults=(Fault("queue", (rank,), 40, 8.0),))
    assert first(verdict(cluster)) == ("slow_link", [rank])


def test_what_a_slow_port_costs_is_what_the_same_run_takes_without_it() -> None:
    cluster = wide(Fault("link", (5,), 40, 6.0), ports="rank")
    found = verdict(cluster)["hypotheses"][0]
    now, fixed = cluster.step_seconds(False)[40:].mean(), cluster.step_seconds(True)[40:].mean()
    assert found["slowdown_pct"] == pytest.approx(100 * (now / fixed - 1), rel=0.1)
    assert found["what_if"]["step_seconds_if_fixed"] == pytest.approx(fixed, rel=0.03)
    assert 40 <= found["detected_step"] <= 46


def test_where_only_everybody_meets_the_rank_is_not_made_up() -> None:
    cluster = Cluster(ranks=16, hosts=16, ep=16, signals=False, faults=(Fault("loss", (5,), 40, 8.0),))
    run = {**cluster.run(), "groups": {"world": [list(range(16))]}}
    found = diagnose(run, cluster.tables())["hypotheses"][0]
    assert found["cause"] == "slow_link"
    assert found["confidence"] < 0.5


def test_a_port_that_was_slow_from_the_start_is_found_by_like_groups() -> None:
    reply = verdict(wide(Fault("link", (5,), 0, 8.0), ports="rank"))
    assert first(reply) == ("slow_link", [5])
    assert reply["hypotheses"][0]["onset_step"] == 0


def test_losses_that_the_port_still_counts_are_not_over_in_calm_steps() -> None:
    lossy = Loss("lossy_link", 42, 2, 5.346)
    cluster = Physical(Layout(16, ep=4, tp=2), 140, "spiky", (lossy,), 1407294147, 16384, 0.573)
    found = diagnose(cluster.run(), simulate(cluster).tables)["hypotheses"][0]
    assert (found["cause"], found["ranks"], found["end_step"]) == ("lossy_link", [2], None)
