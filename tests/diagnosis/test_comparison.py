"""Two runs beside each other: what changed is found with its ranks, what is noise is no difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lens.diagnosis.comparison import BLOCKS, ComparisonError, compare
from lens.tables import Tables, TablesBuilder

MS = 1_000_000
RANKS = 4
Times = dict[str, Any]


def recorded(seed: int, steps: int = 80, first: int = 0, **more: Any) -> tuple[dict[str, Any], Tables]:
    """Four ranks: 5 ms of data, 60 ± 4 ms of forward that neighbouring steps share, an all-reduce that waits for all.

    slow: rank to factor of its forward. transfer: milliseconds. memory: rank to factor of its card's memory. Bursts
    of ten steps are longer on all ranks, now and then, as on a shared machine.
    """
    random = np.random.default_rng(seed)
    builder, at = TablesBuilder(), 0
    drift = np.repeat(random.choice([0.0, 6.0], size=steps // 10 + 1, p=[0.7, 0.3]), 10)
    for step in range(first, first + steps):
        own = 60 + drift[step - first] + random.normal(0, 4, RANKS)
        own *= np.array([more.get("slow", {}).get(rank, 1.0) for rank in range(RANKS)])
        left = at + int((5 + own.max() + more.get("transfer", 3.0)) * MS)
        for rank in range(RANKS):
            whose = {"type": "span", "rank": rank, "step": step}
            entered = at + int((5 + own[rank]) * MS)
            call = {"group": "dp/0", "seq": step, "bytes": 4096}
            for record in (
                {**whose, "kind": "step", "name": "step", "t0_ns": at, "t1_ns": left},
                {**whose, "kind": "phase", "name": "data", "t0_ns": at, "t1_ns": at + 5 * MS},
                {**whose, "kind": "phase", "name": "forward", "t0_ns": at + 5 * MS, "t1_ns": entered},
                {**whose, "kind": "collective", "name": "all_reduce", "t0_ns": entered, "t1_ns": left, "attrs": call},
                {"type": "sample", "metric": "hw.gpu.memory.usage", "rank": rank, "t_ns": left - MS,
                 "value": 2**33 * more.get("memory", {}).get(rank, 1.0) * random.uniform(0.99, 1.01)},
            ):  # fmt: skip
                builder.add(record)
        at = left
    described = {"run": f"run{seed}", "world_size": RANKS, "groups": {"dp": [list(range(RANKS))]}}
    return described, builder.build()


def told(reply: dict[str, Any]) -> list[tuple[str, str, list[int]]]:
    return [(change["kind"], change["name"], change["ranks"]) for change in reply["changes"]]


@pytest.mark.parametrize("seed", range(0, 20, 2))
def test_two_healthy_runs_have_no_difference(seed: int) -> None:
    reply = compare(recorded(seed), recorded(seed + 1))
    assert reply["verdict"] == "no difference"
    assert reply["changes"] == []


def test_a_slow_rank_is_named_before_those_that_wait_for_it() -> None:
    reply = compare(recorded(1), recorded(2, slow={2: 1.5}))
    assert reply["verdict"] == "slower"
    assert told(reply) == [("phase", "forward", [2]), ("wait", "dp", [0, 1, 3])]
    assert reply["step_time"]["pct_low"] < 40 < reply["step_time"]["pct_high"]
    assert compare(recorded(2, slow={2: 1.5}), recorded(1))["verdict"] == "faster"


def test_a_slower_group_is_named_on_all_of_its_ranks() -> None:
    reply = compare(recorded(3), recorded(4, transfer=20.0))
    assert told(reply) == [("transfer", "dp", [0, 1, 2, 3])]
    assert reply["changes"][0]["all_ranks"]


def test_memory_that_grew_is_named_with_its_rank() -> None:
    reply = compare(recorded(5), recorded(6, memory={3: 1.3}))
    assert (reply["verdict"], told(reply)) == ("changed", [("memory", "hw.gpu.memory.usage", [3])])
    assert reply["changes"][0]["pct"] == pytest.approx(30, abs=2)


def test_steps_pair_by_number_and_else_by_order() -> None:
    assert compare(recorded(7), recorded(8))["paired"]["by"] == "step"
    assert compare(recorded(7), recorded(8, first=500))["paired"]["by"] == "order"


def test_what_one_run_does_not_know_is_no_change() -> None:
    known, tables = recorded(9)
    tables.collectives = tables.select("collectives", slice(0, 0))
    reply = compare((known, tables), recorded(10))
    assert reply["not_compared"] == ["transfer dp", "wait dp"]
    assert not [kind for kind, _, _ in told(reply) if kind in ("transfer", "wait")]


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ComparisonError, match="only 15 steps"):
        compare(recorded(11), recorded(12, steps=2 * BLOCKS))
