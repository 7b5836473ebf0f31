"""From a hot expert to the step: rank, peers and layers, and what balanced routing would give."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import Cluster, Fault

from lens.diagnosis import diagnose
from lens.tables import Tables
from sample_runs.cluster import Cluster as Physical
from sample_runs.cluster import Fault as Cause
from sample_runs.cluster import Layout, simulate


def evidence(item: dict[str, Any], metric: str) -> dict[str, Any]:
    return next(each for each in item["evidence"] if each["metric"] == metric)


def without_layers(tables: Tables) -> Tables:
    """As a hook records them that does not know which layer calls."""
    tables.collectives = {**tables.collectives, "layer": tables.collectives["layer"] * 0 - 1}
    return tables


@pytest.mark.parametrize("told", [True, False], ids=["layers_told", "layers_by_order"])
def test_a_hot_expert_is_followed_to_its_peers_layer_by_layer(told: bool) -> None:
    cluster = Cluster(ranks=8, ep=4, layers=3, faults=(Fault("hot_expert", (1, 5), 40, 1.5),))
    tables = cluster.tables() if told else without_layers(cluster.tables())
    found = diagnose(cluster.run(), tables)["hypotheses"][0]
    assert (found["cause"], found["ranks"]) == ("hot_expert", [1, 5])
    waited = [evidence(found, f"comm.wait/layer{layer}") for layer in range(3)]
    now, fixed = cluster.step_seconds(False)[40:].mean(), cluster.step_seconds(True)[40:].mean()
    assert all(each["ranks"] == [0, 2, 3, 4, 6, 7] for each in waited)
    # Peers wait in the expert layers for what the hot ranks compute too long there.
    assert sum(each["observed"] for each in waited) == pytest.approx(now - fixed, rel=0.15)
    assert all(each["baseline"] < 0.1 * each["observed"] for each in waited)
    assert found["slowdown_pct"] == pytest.approx(100 * (now / fixed - 1), rel=0.05)
    for part in ("in layer 2 expert", "times its even share", "for ranks 1, 5 (", "with balanced routing the step"):
        assert part in found["recommendation"]


@pytest.mark.parametrize("layout", [Layout(8, ep=4), Layout(16, ep=4, pp=2)], ids=["one_stage", "pipeline"])
def test_the_step_under_balanced_routing_is_what_the_same_run_takes_with_it(layout: Layout) -> None:
    cluster = Physical(layout, 100, "shared_host", (Cause("hot_expert", 50, 3, 2.2),), seed=4)
    outcome, even = simulate(cluster), simulate(cluster.healthy())
    found = diagnose(cluster.run(), outcome.tables)["hypotheses"][0]
    assert found["cause"] == "hot_expert"
    step = evidence(found, "step.duration")
    assert step["observed"] == pytest.approx(outcome.durations[50:].mean(), rel=0.01)
    assert step["baseline"] == pytest.approx(even.durations[50:].mean(), rel=0.02)
    assert found["what_if"]["step_seconds_if_fixed"] == pytest.approx(even.durations[50:].mean(), rel=0.02)


def test_what_balance_would_give_is_not_said_where_no_collective_tells() -> None:
    cluster = Cluster(ranks=8, ep=4, faults=(Fault("hot_expert", (1, 5), 40, 1.5),))
    tables = cluster.tables()
    other = tables.collectives["op"] != tables.code("all_to_all")
    tables.collectives = tables.select("collectives", other)
    for item in diagnose(cluster.run(), tables)["hypotheses"]:
        assert "balanced routing" not in item["recommendation"]
        assert not any(each["metric"].startswith("comm.wait/") for each in item["evidence"])
