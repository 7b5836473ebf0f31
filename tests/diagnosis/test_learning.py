"""What finite losses and gradient norms say: a loss that jumps for all, a rank that computes something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cluster import Cluster
from helpers import first

from lens.diagnosis import diagnose

LOSS, NORM = "train.loss.local", "train.grad_norm.local"


def reply(metric: str, factor: float, ranks: list[int], steps: range) -> dict[str, Any]:
    """The verdict on a healthy run of which one metric was multiplied on some ranks in some steps."""
    cluster = Cluster(ranks=8, steps=100)
    tables = cluster.tables()
    samples = tables.samples
    chosen = (samples["metric"] == tables.code(metric)) & np.isin(samples["rank"], ranks)
    chosen &= np.isin(samples["step"], list(steps))
    assert chosen.sum() == len(ranks) * len(steps)
    samples["value"] = np.where(chosen, samples["value"] * factor, samples["value"])
    return diagnose(cluster.run(), tables)


def test_a_loss_that_jumps_on_all_ranks_is_a_spike_of_nobody() -> None:
    found = reply(LOSS, 8.0, list(range(8)), range(60, 64))
    assert (found["status"], first(found)) == ("degraded", ("loss_spike", []))
    assert found["hypotheses"][0]["onset_step"] == 60
    assert found["hypotheses"][0]["end_step"] == 63


def test_one_rank_with_an_odd_batch_is_no_spike() -> None:
    assert reply(LOSS, 8.0, [3], range(60, 61))["status"] == "healthy"


@pytest.mark.parametrize("factor", [4.0, 0.2])
def test_a_gradient_norm_that_leaves_its_peers_for_good_names_its_rank(factor: float) -> None:
    found = reply(NORM, factor, [5], range(50, 100))
    assert first(found) == ("silent_corruption", [5])
    assert abs(found["hypotheses"][0]["onset_step"] - 50) <= 1


def test_norms_that_leave_together_or_for_a_step_are_no_corruption() -> None:
    assert reply(NORM, 4.0, list(range(8)), range(50, 100))["status"] == "healthy"
    assert reply(NORM, 4.0, [5], range(50, 51))["status"] == "healthy"
