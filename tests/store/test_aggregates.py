"""Roll-up and newest values of any samples, in any order, are those that counting row by row gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.slots import NULL
from lens.store import groups
from lens.store.aggregates import SERIES, aggregated
from lens.store.groups import grouped
from lens.store.schema import FINE_BUCKET, STEP_BUCKET, TIME_BUCKET_NS

SERIES_OF = {(1, 9): 0, (1, 5): 1, (2, 9): 2, (2, 7): 3}
rows = st.lists(
    st.tuples(
        st.sampled_from(list(SERIES_OF)), st.integers(-1, 2), st.just(NULL) | st.integers(0, 250),
        st.integers(0, 3 * TIME_BUCKET_NS), st.integers(-9, 9).map(float) | st.sampled_from([math.nan, math.inf, -math.inf]),
    ),
    min_size=1, max_size=40,
)  # fmt: skip


def table(found: list[Any]) -> pa.Table:
    series, rank, step, t_ns, value = zip(*found, strict=True)
    return pa.table({
        "run": np.array([run for run, _ in series], "<u4"), "mid": np.array([mid for _, mid in series], "<u8"),
        SERIES: np.array([SERIES_OF[each] for each in series], "<i4"), "rank": np.array(rank, "<i4"),
        "step": np.array(step, "<i8"), "t_ns": np.array(t_ns, "<i8"), "value": np.array(value, "<f8"),
    })  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(rows)
def test_what_is_worked_out_is_what_counting_gives(found: list[Any]) -> None:
    made = aggregated(table(found))
    keys = [(run, mid, rank, step, t_ns) for (run, mid), rank, step, t_ns, _ in found]
    samples = made["samples"]
    assert [
        tuple(row[name] for name in ("run", "mid", "rank", "step", "t_ns")) for row in samples.to_pylist()
    ] == sorted(keys)
    assert sorted(map(str, samples.column("value").to_pylist())) == sorted(str(each[-1]) for each in found)
    rolled: dict[Any, list[float]] = {}
    newest: dict[Any, list[tuple[int, str]]] = {}
    times: dict[Any, int] = {}
    for (run, mid), rank, step, t_ns, value in found:
        bucket = (1, t_ns // TIME_BUCKET_NS) if step < 0 else (0, step // STEP_BUCKET)
        rolled.setdefault((run, mid, rank, *bucket), []).append(value)
        times[run, mid, rank] = max(times.get((run, mid, rank), -1), t_ns)
        newest.setdefault((run, mid, rank, t_ns), []).append((step, str(value)))
    for row in made["rollup"].to_pylist():
        values = rolled.pop(tuple(row[name] for name in ("run", "mid", "rank", "axis", "bucket")))
        finite = [value for value in values if math.isfinite(value)]
        wanted = (
            min(finite, default=math.inf),
            max(finite, default=-math.inf),
            sum(finite),
            len(finite),
            len(values) - len(finite),
        )
        assert tuple(row[name] for name in ("min", "max", "sum", "count", "odd")) == wanted
    assert not rolled
    fine: dict[Any, list[float]] = {}
    for (run, mid), rank, step, _, value in found:
        if step >= 0:
            fine.setdefault((run, mid, rank, step // FINE_BUCKET), []).append(value)
    for row in made["rollup_fine"].to_pylist() if "rollup_fine" in made else []:
        values = fine.pop(tuple(row[name] for name in ("run", "mid", "rank", "bucket")))
        finite = [value for value in values if math.isfinite(value)]
        assert (row["min"], row["max"]) == (min(finite, default=math.inf), max(finite, default=-math.inf))
    assert not fine
    latest = {(row["run"], row["mid"], row["rank"]): row for row in made["latest"].to_pylist()}
    assert {key: row["t_ns"] for key, row in latest.items()} == times
    for key, row in latest.items():
        assert (row["step"], str(row["value"])) in newest[(*key, row["t_ns"])]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 5), st.integers(-1, 3)), min_size=1), st.sampled_from([1, 1 << 22]))
def test_rows_of_equal_codes_are_together_and_in_their_order(pairs: list[tuple[int, int]], places: int) -> None:
    before, groups.MOST_PLACES = groups.MOST_PLACES, places
    try:
        found = grouped([np.array(column, "<i4") for column in zip(*pairs, strict=True)], [6, 4])
    finally:
        groups.MOST_PLACES = before
    order, ends = found.sorted_rows()
    assert [pairs[row] for row in order] == sorted(pairs)
    assert order.tolist() == sorted(range(len(pairs)), key=lambda row: pairs[row])
    assert [pairs[row] for row in found.first] == sorted(set(pairs))
    assert ends[-1] == len(pairs)
