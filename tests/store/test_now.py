"""The present of a run: what large runs send pre-reduced counts, and what nobody told stays unknown."""

from __future__ import annotations

import pytest

from lens.store.folder import DataFolder
from lens.store.query import Query

from .helpers import SECOND, START, send, step_span


def test_vectors_over_ranks_tell_pace_and_waiting_like_spans(folder: DataFolder, query: Query) -> None:
    folder.describe_run({"run": "large", "world_size": 3})
    vector = {"type": "vector", "t_ns": START}
    records = []
    for step in range(20):
        duration = [9.0] * 3 if step < 10 else [0.2] * 3  # only the newest ten steps count
        records.append({**vector, "metric": "step.duration", "step": step, "values": duration})
        waits = {**vector, "metric": "comm.wait", "step": step, "labels": {"group": "dp/0", "op": "all_reduce"}}
        records.append({**waits, "values": [0.1, 0.1, 0.0]})
    send(folder, "large", records)
    ranks = query.now("large")["ranks"]
    assert [rank["step_s"] for rank in ranks] == pytest.approx([0.2] * 3)
    assert [rank["wait_share"] for rank in ranks] == pytest.approx([0.5, 0.5, 0.0])
    assert {(rank["state"], rank["phase"], rank["collective"]) for rank in ranks} == {(None, None, None)}


def test_without_heartbeats_an_open_phase_says_where_a_rank_is(folder: DataFolder, query: Query) -> None:
    folder.describe_run({"run": "r", "world_size": 2})
    begun = {"type": "span", "kind": "phase", "rank": 1, "step": 4, "t1_ns": None}
    records = [step_span(rank, step) for step in range(4) for rank in range(2)]
    send(folder, "r", [*records, {**begun, "name": "forward", "t0_ns": START + 4 * SECOND}])
    reply = query.now("r")
    assert [rank["phase"] for rank in reply["ranks"]] == [None, "forward"]
    assert [rank["wait_share"] for rank in reply["ranks"]] == [None, None]
    assert reply["steps_per_s"] == pytest.approx(1.0)


def test_a_run_without_records_has_a_present_too(folder: DataFolder, query: Query) -> None:
    folder.describe_run({"run": "new", "world_size": 1})
    reply = query.now("new")
    assert (reply["steps_per_s"], reply["hosts"], reply["ranks"][0]["step_s"]) == (None, [], None)
    assert (reply["ranks"][0]["age_s"], reply["ranks"][0]["values"]) == (None, {})
