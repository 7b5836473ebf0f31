"""What all ranks wait for alike, since the first step or since later; one rank's own waiting is something else."""

from __future__ import annotations

import pytest
from cluster import Cluster, Fault
from helpers import first, verdict

EVERYBODY = ()


@pytest.mark.parametrize("noise", ["quiet", "shared", "sequences", "spiky"])
@pytest.mark.parametrize("loading", [0.3, 1.0])
def test_a_run_whose_every_rank_always_waits_for_batches_is_input_bound(noise: str, loading: float) -> None:
    reply = verdict(Cluster(ranks=8, noise=noise, seed=2, loading=loading))
    (found,) = reply["hypotheses"]
    assert (found["cause"], found["ranks"], found["onset_step"]) == ("input_bound", [], 0)
    assert reply["status"] == "degraded"


@pytest.mark.parametrize("noise", ["quiet", "shared", "sequences"])
@pytest.mark.parametrize("seconds", [0.02, 0.08])
def test_loaders_that_became_slow_everywhere_have_an_onset_and_a_price(noise: str, seconds: float) -> None:
    cluster = Cluster(ranks=8, noise=noise, seed=6, faults=(Fault("data", EVERYBODY, 50, seconds),))
    found = verdict(cluster)["hypotheses"][0]
    now, fixed = cluster.step_seconds(False)[50:].mean(), cluster.step_seconds(True)[50:].mean()
    assert (found["cause"], found["ranks"]) == ("input_bound", [])
    assert abs(found["onset_step"] - 50) <= 2
    assert found["slowdown_pct"] == pytest.approx(100 * (now / fixed - 1), rel=0.15)


@pytest.mark.parametrize("copies", [0.3, 0.8])
def test_copies_that_block_every_rank_are_named(copies: float) -> None:
    found = verdict(Cluster(ranks=8, seed=1, copies=copies))["hypotheses"]
    assert [(item["cause"], item["ranks"]) for item in found] == [("h2d_blocking", [])]


@pytest.mark.parametrize("ranks", [(2,), (0, 1, 2, 3)], ids=["one", "a host"])
def test_loaders_that_are_slow_on_some_ranks_are_theirs(ranks: tuple[int, ...]) -> None:
    reply = verdict(Cluster(ranks=8, faults=(Fault("data", ranks, 40, 0.04),)))
    assert first(reply) == ("slow_dataloader", list(ranks))
    assert "input_bound" not in {item["cause"] for item in reply["hypotheses"]}


def test_one_slow_loader_in_a_run_that_waits_for_batches_anyway_is_named_too() -> None:
    cluster = Cluster(ranks=8, loading=0.6, faults=(Fault("data", (3,), 50, 0.03),))
    found = {(item["cause"], *item["ranks"]) for item in verdict(cluster)["hypotheses"]}
    assert found == {("slow_dataloader", 3), ("input_bound",)}


@pytest.mark.parametrize(("loading", "copies"), [(0.1, 0.0), (0.02, 0.1)])
def test_what_takes_a_tenth_of_the_step_binds_nobody(loading: float, copies: float) -> None:
    assert verdict(Cluster(ranks=8, loading=loading, copies=copies))["hypotheses"] == []
