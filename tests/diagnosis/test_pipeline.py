"""The pipeline's bubble beside that of 1F1B: measured from waits, micro-batches from steps or messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lens.diagnosis import diagnose
from lens.diagnosis.ledger import ledger
from lens.slots import NULL
from lens.tables import Tables
from sample_runs.cluster import Cluster, Fault, Layout, simulate


def run_of(layout: Layout, *faults: Fault, **more: Any) -> tuple[dict[str, Any], Tables]:
    cluster = Cluster(layout, 40, "clean", faults, seed=4, **more)
    return cluster.run(), simulate(cluster).tables


def without_micro_batches(tables: Tables) -> Tables:
    tables.steps = {**tables.steps, "micro_batches": np.full(tables.count("steps"), NULL)}
    return tables


@pytest.mark.parametrize("unwaited", [False, True], ids=["blocking_sends", "asynchronous_sends"])
@pytest.mark.parametrize(("layout", "theory"), [(Layout(8, ep=2, pp=2), 1 / 3), (Layout(16, ep=2, pp=4), 3 / 7)])
def test_equal_stages_idle_what_the_schedule_makes_of_them(layout: Layout, theory: float, unwaited: bool) -> None:
    run, tables = run_of(layout, unwaited=unwaited)
    told = ledger(run, tables)["pipeline"]
    assert (told["stages"], told["micro_batches"], told["reason"]) == (layout.pp, layout.pp, None)
    assert told["theory_share"] == pytest.approx(theory, abs=1e-4)
    assert told["bubble_share"] == pytest.approx(theory, rel=0.05)
    assert ledger(run, without_micro_batches(tables))["pipeline"] == told


def test_an_uneven_stage_idles_the_others_beyond_the_theory_and_says_so() -> None:
    run, tables = run_of(Layout(16, ep=4, pp=2), Fault("pipeline_imbalance", 0, 3, 1.5))
    found = diagnose(run, tables)["hypotheses"][0]
    assert found["cause"] == "pipeline_imbalance"
    idle = next(each for each in found["evidence"] if each["metric"] == "pipeline.bubble")
    assert idle["baseline"] == pytest.approx(1 / 3, abs=1e-4)
    # Two micro-batches of 1.5 in the longer stage and the last of 1 in the other: 4, of which they work 3 and 2.
    assert idle["observed"] == pytest.approx(3 / 8, rel=0.05)
    assert "33 % are what 1F1B makes of 2 equal stages and 2 micro-batches" in found["recommendation"]


def test_what_is_not_known_is_absent_with_its_reason() -> None:
    run, tables = run_of(Layout(8, ep=4))
    assert ledger(run, tables)["pipeline"] is None
    run, tables = run_of(Layout(8, ep=2, pp=2))
    messages = np.isin(tables.collectives["op"], [tables.code("send"), tables.code("recv")])
    tables.collectives = tables.select("collectives", ~messages)
    told = ledger(run, without_micro_batches(tables))["pipeline"]
    assert (told["micro_batches"], told["theory_share"], told["bubble_share"]) == (None, None, None)
    assert told["reason"]


def test_interleaved_stages_are_not_held_against_the_bubble_of_plain_ones() -> None:
    run, tables = run_of(Layout(16, ep=2, pp=4))
    # The last stage hands its first chunk on to the first stage.
    wrapped = tables.code("pp/0:4-8")
    tables.strings[wrapped] = "pp/0:12-0"
    told = ledger(run, tables)["pipeline"]
    assert told["theory_share"] is None
    assert "interleaved" in told["reason"]
