"""Several causes at once: each is told, also those that cost nothing while another one is waited for."""

from __future__ import annotations

import pytest
from cluster import Cluster, Fault
from helpers import verdict


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("slow_device", "compute", 1, 1.5), ("slow_dataloader", "data", 6, 0.02)),
        (("slow_device", "compute", 1, 1.5), ("slow_dataloader", "data", 6, 0.01)),
        (("slow_device", "compute", 1, 1.5), ("slow_device", "compute", 6, 1.5)),
        (("thermal_throttle", "thermal", 1, 1.5), ("unexplained", "unknown", 6, 1.4)),
        (("slow_dataloader", "data", 1, 0.02), ("slow_device", "compute", 1, 1.5)),
    ],
)
def test_two_causes_with_one_onset_are_both_told_and_nobody_else_is(
    one: tuple[str, str, int, float], other: tuple[str, str, int, float]
) -> None:
    faults = tuple(Fault(kind, (rank,), 40, strength) for _, kind, rank, strength in (one, other))
    reply = verdict(Cluster(ranks=8, steps=100, seed=1, faults=faults))
    found = {item["finding"]: item for item in reversed(reply["hypotheses"])}
    assert sorted((item["cause"], item["ranks"]) for item in found.values()) == sorted(
        [(one[0], [one[2]]), (other[0], [other[2]])]
    )
    assert all(abs(item["onset_step"] - 40) <= 3 for item in found.values())


def test_a_cause_behind_another_says_what_it_costs_once_that_is_repaired() -> None:
    faults = (Fault("compute", (1,), 40, 1.5), Fault("data", (6,), 40, 0.04))
    cluster = Cluster(ranks=8, steps=100, seed=1, faults=faults)
    last = verdict(cluster)["hypotheses"][-1]
    assert (last["cause"], last["ranks"]) == ("slow_device", [1])
    assert last["slowdown_pct"] < 1
    alone = Cluster(ranks=8, steps=100, seed=1, faults=faults[:1])
    costs = 100 * (alone.step_seconds(False)[40:].mean() / alone.step_seconds(True)[40:].mean() - 1)
    said = last["recommendation"].split("once that is repaired, this costs ")[1]
    assert "rank 6" in last["recommendation"]
    assert float(said.split(" %")[0]) == pytest.approx(costs, rel=0.15)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_hot_cards_among_ranks_that_all_got_slower_are_no_hot_run(seed: int) -> None:
    faults = (Fault("unknown", (0, 3), 45, 1.3), Fault("thermal", (1, 2), 45, 1.3))
    reply = verdict(Cluster(ranks=4, hosts=2, steps=100, seed=seed, noise="shared", faults=faults))
    hot = {rank for item in reply["hypotheses"] if item["cause"] == "thermal_throttle" for rank in item["ranks"]}
    assert hot <= {1, 2}


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_an_owner_that_is_slower_than_its_few_more_tokens_explain_is_a_slow_card(seed: int) -> None:
    faults = (Fault("hot_expert", (0, 2), 26, 1.3), Fault("compute", (0,), 40, 1.6))
    reply = verdict(Cluster(ranks=4, hosts=2, steps=100, seed=seed, noise="shared", faults=faults))
    first = reply["hypotheses"][0]
    assert (first["cause"], first["ranks"]) == ("slow_device", [0])
