"""Nothing wrong: silence, at every step of the run, in every kind of noise."""

from __future__ import annotations

import pytest
from cluster import Cluster
from fabric import WEATHER
from helpers import verdict
from noises import NOISE

from lens.diagnosis.examine import Examiner
from lens.diagnosis.grids import grid
from lens.diagnosis.judge import CAUSES, Judge
from lens.diagnosis.select import Timeline
from lens.diagnosis.topology import Topology


def alarms(cluster: Cluster) -> int:
    """Different findings that any reply of the run, up to any of its steps, would have held."""
    tables = cluster.tables()
    timeline = Timeline.of(tables)
    examiner = Examiner.of(tables, timeline, Topology.of(cluster.run(), tables))
    begin = examiner.first_raised()
    places = set(range(cluster.steps if begin is None else begin, cluster.steps))
    judge, held = Judge(examiner), set()
    for place in sorted(places | set(grid(cluster.steps).tolist()) | {cluster.steps - 1}):
        if named := judge.named(place):
            held |= named - {(n.cause, n.rows) for n in judge.at(place)[1] if CAUSES[n.cause].severity == "info"}
    return len(held)


@pytest.mark.parametrize("noise", sorted(NOISE))
def test_false_alarms_stay_below_one_in_two_thousand_steps(noise: str) -> None:
    runs = [
        Cluster(ranks=4, hosts=2, steps=120, noise=noise, seed=31, checkpoint_every=25, eval_every=40),
        Cluster(ranks=4, hosts=1, steps=120, noise=noise, seed=32, checkpoint_every=25, eval_every=40),
        Cluster(ranks=8, hosts=2, steps=400, noise=noise, seed=33, checkpoint_every=50, offsets_s=0.005),
        Cluster(ranks=16, hosts=4, steps=200, noise=noise, seed=34, vendors={"H200": 1.0, "MI400": 1.4}),
    ]
    assert sum(alarms(cluster) for cluster in runs) <= 0.5 * sum(cluster.steps for cluster in runs) / 1000


@pytest.mark.parametrize("weather", sorted(WEATHER))
def test_the_weather_of_a_fabric_is_no_fault(weather: str) -> None:
    runs = [
        Cluster(ranks=8, hosts=2, steps=200, weather=weather, seed=51, small=4, ports="rank", offsets_s=0.005),
        Cluster(ranks=16, hosts=4, ep=8, steps=300, weather=weather, noise="shared", seed=52, eval_every=40),
        Cluster(ranks=16, hosts=4, stages=4, steps=200, weather=weather, pipe=True, seed=53, ports="host"),
    ]
    assert sum(alarms(cluster) for cluster in runs) == 0


@pytest.mark.parametrize("seed", range(10))
def test_ten_of_ten_healthy_runs_of_four_ranks_are_healthy(seed: int) -> None:
    reply = verdict(Cluster(ranks=4, noise="shared", seed=seed, checkpoint_every=50, eval_every=60))
    assert (reply["status"], reply["hypotheses"]) == ("healthy", [])


def test_warm_up_alone_is_not_enough_to_judge() -> None:
    cluster = Cluster(ranks=4, steps=60)
    assert verdict(cluster, upto_step=4)["status"] == "insufficient"
    assert verdict(cluster, upto_step=30)["status"] == "healthy"
