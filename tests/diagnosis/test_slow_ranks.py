"""Ranks that take too long: the right cause, the right rank, in time, at the right price; look-alikes told apart."""

from __future__ import annotations

import pytest
from cluster import Cluster, Fault
from helpers import first, verdict

STEP_S = 0.04


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault("compute", (), 40, 1.7), "slow_device"),
        (Fault("data", (), 40, 1.0 * STEP_S), "slow_dataloader"),
        (Fault("nan", (), 40), "nan_origin"),
    ],
    ids=["slow_compute", "slow_loader", "nan"],
)
def test_names_cause_and_rank_on_a_shared_machine(fault: Fault, cause: str, rank: int, seed: int) -> None:
    injected = Fault(fault.kind, (rank,), fault.step, fault.strength)
    reply = verdict(Cluster(ranks=4, noise="shared", seed=seed, faults=(injected,)))
    assert first(reply) == (cause, [rank])
    assert reply["status"] == ("failed" if cause == "nan_origin" else "degraded")


@pytest.mark.parametrize("noise", ["quiet", "spiky", "sequences", "collected", "drifting"])
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("compute", "slow_device"), ("thermal", "thermal_throttle"), ("power_cap", "power_cap"),
        ("unknown", "unexplained"),
    ],
)  # fmt: skip
def test_tells_look_alikes_apart_in_every_noise(noise: str, kind: str, cause: str) -> None:
    fault = Fault(kind, (5,), 50, 1.4)
    reply = verdict(Cluster(ranks=8, noise=noise, seed=21, offsets_s=0.005, checkpoint_every=30, faults=(fault,)))
    assert first(reply) == (cause, [5])
    assert all(item["ranks"] == [5] for item in reply["hypotheses"]), "a victim was blamed"


def test_finds_fifteen_percent_within_five_steps_of_a_quiet_run() -> None:
    reply = verdict(Cluster(ranks=8, faults=(Fault("compute", (6,), 60, 1.25),)))
    found = reply["hypotheses"][0]
    assert found["slowdown_pct"] >= 13
    assert 60 <= found["detected_step"] <= 65
    assert abs(found["onset_step"] - 60) <= 1


@pytest.mark.parametrize("kind", ["compute", "data"])
def test_cost_is_what_the_same_run_takes_without_the_fault(kind: str) -> None:
    cluster = Cluster(ranks=8, faults=(Fault(kind, (2,), 40, 1.5 if kind == "compute" else 0.02),))
    found = verdict(cluster)["hypotheses"][0]
    now, fixed = cluster.step_seconds(False)[40:].mean(), cluster.step_seconds(True)[40:].mean()
    assert found["slowdown_pct"] == pytest.approx(100 * (now / fixed - 1), rel=0.1)
    assert found["lost_seconds_per_step"] == pytest.approx(now - fixed, rel=0.1)
    assert found["what_if"]["step_seconds_now"] == pytest.approx(now, rel=0.02)
    assert found["what_if"]["step_seconds_if_fixed"] == pytest.approx(fixed, rel=0.03)


def test_names_both_of_two_causes_at_once_costliest_first() -> None:
    faults = (Fault("compute", (1,), 40, 1.5), Fault("data", (6,), 60, 0.03))
    reply = verdict(Cluster(ranks=8, steps=160, faults=faults))
    found = {item["finding"]: (item["cause"], item["ranks"]) for item in reversed(reply["hypotheses"])}
    assert set(map(str, found.values())) == {"('slow_device', [1])", "('slow_dataloader', [6])"}


def test_owners_of_hot_experts_are_one_finding() -> None:
    fault = Fault("hot_expert", (1, 3, 5, 7), 40, 1.5)
    reply = verdict(Cluster(ranks=8, ep=2, faults=(fault,)))
    assert first(reply) == ("hot_expert", [1, 3, 5, 7])


def test_a_whole_host_is_named_as_the_host() -> None:
    fault = Fault("power_cap", (4, 5, 6, 7), 40, 1.3)
    reply = verdict(Cluster(ranks=16, hosts=4, ep=8, faults=(fault,)))
    assert first(reply) == ("power_cap", [4, 5, 6, 7])
    assert reply["hypotheses"][0]["component"] == "host1"


def test_cards_of_two_makes_are_no_fault_but_a_slow_one_among_them_is() -> None:
    makes = {"H200": 1.0, "MI400": 1.5}
    assert verdict(Cluster(ranks=8, vendors=makes))["status"] == "healthy"
    reply = verdict(Cluster(ranks=8, vendors=makes, faults=(Fault("compute", (3,), 50, 1.5),)))
    assert first(reply) == ("slow_device", [3])


def test_a_card_that_was_slow_from_the_start_is_found_by_its_peers() -> None:
    reply = verdict(Cluster(ranks=8, faults=(Fault("compute", (5,), 0, 1.4),)))
    assert first(reply) == ("slow_device", [5])
    assert reply["hypotheses"][0]["onset_step"] == 0


def test_without_card_signals_a_slow_rank_is_a_slow_device_at_low_confidence() -> None:
    cluster = Cluster(ranks=8, signals=False, faults=(Fault("compute", (5,), 40, 1.5),))
    reply = verdict(cluster)
    assert first(reply) == ("slow_device", [5])
    assert reply["hypotheses"][0]["confidence"] < 0.75
    assert "gpu.clock.sm" in reply["coverage"]["signals_missing"]


def test_a_fault_that_passed_has_an_end() -> None:
    reply = verdict(Cluster(ranks=8, steps=160, faults=(Fault("compute", (4,), 50, 1.5, until=99),)))
    assert first(reply) == ("slow_device", [4])
    assert abs(reply["hypotheses"][0]["end_step"] - 99) <= 2


def test_pipeline_stages_compare_with_themselves() -> None:
    reply = verdict(Cluster(ranks=16, stages=4, ep=2, faults=(Fault("compute", (9,), 40, 1.5),)))
    assert first(reply) == ("slow_device", [9])


def test_the_sentence_names_rank_card_cost_and_reason() -> None:
    found = verdict(Cluster(ranks=8, faults=(Fault("compute", (5,), 40, 1.5),)))["hypotheses"][0]
    for part in ("Rank 5", "host1/gpu1", "ms longer per step", "SM clock fell from"):
        assert part in found["recommendation"]
    assert {"comm.self", "gpu.clock.sm"} <= {item["metric"] for item in found["evidence"]}
    assert {"thermal_throttle", "power_cap"} <= {item["cause"] for item in found["against"]}


def test_without_a_run_object_the_topology_is_derived() -> None:
    cluster = Cluster(ranks=8, topology=False, faults=(Fault("compute", (5,), 40, 1.5),))
    reply = verdict(cluster)
    assert first(reply) == ("slow_device", [5])
    assert "run.groups" in reply["coverage"]["signals_missing"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("noise", ["quiet", "shared", "drifting"])
@pytest.mark.parametrize("onset", [0, 8])
def test_a_slow_card_of_two_of_its_make_is_no_imbalance_of_makes(onset: int, noise: str, rank: int) -> None:
    cluster = Cluster(
        ranks=4, hosts=2, seed=1, noise=noise, steps=80, vendors={"H200": 1.0, "MI400": 1.5},
        faults=(Fault("compute", (rank,), onset, 1.6),),
    )  # fmt: skip
    reply = verdict(cluster)
    assert first(reply) == ("slow_device", [rank])
    assert all(item["ranks"] in ([rank], []) for item in reply["hypotheses"])


def test_two_equal_cards_of_which_one_is_slower_for_no_known_reason_are_not_judged_from_the_start() -> None:
    cluster = Cluster(
        ranks=4, hosts=2, vendors={"H200": 1.0, "MI400": 1.5}, faults=(Fault("unknown", (1,), 0, 1.4),)
    )
    assert [item["cause"] for item in verdict(cluster)["hypotheses"]] == ["mixed_vendor_imbalance"]


@pytest.mark.parametrize("noise", ["drifting", "correlated"])
def test_a_host_is_one_finding_though_one_of_its_ranks_was_slow_before(noise: str) -> None:
    host, before = Fault("power_cap", (4, 5, 6, 7), 50, 1.4), Fault("unknown", (5,), 25, 1.15)
    cluster = Cluster(ranks=32, hosts=8, ep=4, noise=noise, seed=1, steps=100, faults=(host, before))
    reply = verdict(cluster)
    assert first(reply) == ("power_cap", [4, 5, 6, 7])
    assert reply["hypotheses"][0]["slowdown_pct"] > 20
