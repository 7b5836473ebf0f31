"""Where within the step time is lost: it costs what it costs there, and is seen in a short part of the step below noise."""

from __future__ import annotations

import pytest
from cluster import Cluster, Fault
from helpers import first, verdict


@pytest.mark.parametrize("kind", ["between", "update"])
def test_what_is_lost_in_one_place_costs_what_it_costs_there(kind: str) -> None:
    cluster = Cluster(ranks=8, faults=(Fault(kind, (2,), 40, 0.12),))
    found = verdict(cluster)["hypotheses"][0]
    assert (found["cause"], found["ranks"]) == ("unexplained", [2])
    now, fixed = cluster.step_seconds(False)[40:].mean(), cluster.step_seconds(True)[40:].mean()
    assert found["slowdown_pct"] == pytest.approx(100 * (now / fixed - 1), rel=0.25)


def test_a_slow_update_is_seen_below_the_noise_of_the_whole_step() -> None:
    reply = verdict(Cluster(ranks=8, noise="correlated", seed=3, faults=(Fault("update", (5,), 50, 0.15),)))
    assert first(reply) == ("unexplained", [5])
    assert "takes in the optimizer" in reply["hypotheses"][0]["recommendation"]
