"""The verdict hangs on the records alone: not on their order, on the batches they came in, nor on how often each came."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from helpers import shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.diagnosis import diagnose
from lens.tables import SCHEMA, Tables
from sample_runs.cluster.cases import draw_cases
from sample_runs.cluster.faults import FAULTS
from sample_runs.cluster.simulation import simulate

CASES = {case.fault.name: case for case in draw_cases(len(FAULTS), 11) if case.fault is not None}
SMALL = [name for name, case in CASES.items() if case.cluster.layout.ranks <= 16]


@cache
def judged(fault: str) -> tuple[dict[str, Any], Tables, dict[str, Any]]:
    """A run with this fault: what is known of it, its records, the verdict."""
    cluster = CASES[fault].cluster
    run, tables = cluster.run(), simulate(cluster).tables
    return run, tables, diagnose(run, tables)


def batches(tables: Tables, count: int, seed: int) -> list[Tables]:
    """The records dealt out at random; each batch has names of its own order, as each sender's has."""
    random = np.random.default_rng(seed)
    dealt = {name: random.integers(count, size=tables.count(name)) for name in SCHEMA}
    parts = []
    for number in range(count):
        part = Tables(strings=tables.strings, vector_values=tables.vector_values)
        for name in SCHEMA:
            setattr(part, name, tables.select(name, dealt[name] == number))
        parts.append(shuffled(part, seed + number))
    return parts


@given(
    fault=st.sampled_from(SMALL),
    count=st.integers(1, 9),
    again=st.lists(st.integers(0, 8), max_size=9),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_other_batches_in_another_order_and_some_twice_give_the_same_verdict(
    fault: str, count: int, again: list[int], seed: int
) -> None:
    run, tables, reply = judged(fault)
    parts = batches(tables, count, seed)
    parts += [parts[number % count] for number in again]
    assert diagnose(run, Tables.concat(parts)) == reply


@pytest.mark.parametrize("fault", ["ecc_remap", "process_stopped"])
def test_reports_that_are_counted_are_counted_once(fault: str) -> None:
    run, tables, reply = judged(fault)
    assert diagnose(run, Tables.concat([tables, tables])) == reply
