"""One cause on one rank is one finding, at the price of all that it does."""

from __future__ import annotations

import pytest
from cluster import Cluster, Fault
from helpers import verdict


@pytest.mark.parametrize("noise", ["quiet", "shared"])
@pytest.mark.parametrize("strength", [6.0, 12.0])
def test_a_throttled_process_that_computes_and_transfers_slowly_is_one_finding(noise: str, strength: float) -> None:
    faults = (Fault("quota", (5,), 40, strength), Fault("unknown", (5,), 40, 1 + strength / 20))
    cluster = Cluster(ranks=16, hosts=4, ep=8, seed=2, noise=noise, steps=160, ports="rank", faults=faults)
    (found,) = verdict(cluster)["hypotheses"]
    now, fixed = cluster.step_seconds(False)[40:].mean(), cluster.step_seconds(True)[40:].mean()
    assert (found["cause"], found["ranks"]) == ("cpu_quota", [5])
    assert found["slowdown_pct"] == pytest.approx(100 * (now / fixed - 1), rel=0.3)
    assert {"comm.self", "comm.transfer"} <= {item["metric"] for item in found["evidence"]}


def test_another_cause_on_another_rank_stays_a_finding_of_its_own() -> None:
    faults = (Fault("compute", (5,), 40, 1.6), Fault("data", (2,), 70, 0.03))
    found = {
        (item["cause"], *item["ranks"])
        for item in verdict(Cluster(ranks=8, steps=160, faults=faults))["hypotheses"]
    }
    assert found == {("slow_device", 5), ("slow_dataloader", 2)}
