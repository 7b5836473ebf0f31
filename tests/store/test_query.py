"""Reads: envelopes keep spikes, maps pool by maximum, missing stays missing, steps and times find each other."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens.slots import NULL
from lens.store import charts as charting
from lens.store import grids
from lens.store.errors import BadQueryError, UnknownRunError, UnknownStepError
from lens.store.folder import DataFolder
from lens.store.grids import Window
from lens.store.held import covered
from lens.store.history import Update
from lens.store.query import Query
from lens.store.relations import Selection

from .helpers import SECOND, START, sample, send, step_span


@pytest.fixture
def run(folder: DataFolder) -> str:
    folder.describe_run({"run": "r", "world_size": 3})
    return "r"


def test_one_spike_in_many_steps_survives_every_zoom(folder: DataFolder, query: Query, run: str) -> None:
    records = [sample("m", 1.0, step, rank=0) for step in range(20_000)]
    records[13_337]["value"] = 1000.0
    records[777]["value"] = -5.0
    send(folder, run, records)
    for points in (1, 7, 100, 1000, 20_000, 50_000):
        reply = query.series(run, Selection("m"), Window(pieces=points))
        (line,) = reply["series"]
        assert len(line["x"]) <= points
        assert max(line["max"]) == 1000.0
        assert min(line["min"]) == -5.0
        assert sum(line["count"]) == 20_000
        whole = sum(mean * count for mean, count in zip(line["mean"], line["count"], strict=True))
        assert whole == pytest.approx(19_998 + 1000 - 5)
        spike = line["max"].index(1000.0)
        assert line["x"][spike] <= 13_337 < line["x"][spike] + reply["width"]
        heat = query.heatmap(run, Selection("m"), Window(pieces=points))
        assert max(value for value in heat["values"][0] if value is not None) == 1000.0


def test_rows_grouped_here_and_by_the_database_are_the_same_charts(
    folder: DataFolder, query: Query, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[Any] = [1.0, -2.0, "NaN", 4.0, "Infinity", 0.5]
    send(folder, run, [
        sample("m", values[(step * 7 + rank) % 6], step, rank=rank, device=device)
        for step in range(3, 60) for rank in (2, 0) for device in ("d1", "d0")
    ])  # fmt: skip

    def charts() -> list[Any]:
        found: list[Any] = [query.series(run, Selection("m"), Window(pieces=pieces)) for pieces in (7, 1000)]
        for pool in ("max", "min", "mean"):
            found += [
                query.heatmap(run, Selection("m"), Window(0, 99, 10), rows, pool) for rows in ("rank", "device")
            ]
        for line in [line for reply in found[:2] for line in reply["series"]]:
            # Of several odd values in a bucket the database shows any.
            for key in ("min", "max", "mean"):
                line[key] = [value if isinstance(value, float) else "odd" for value in line[key]]
        return found

    here = charts()
    monkeypatch.setattr(charting, "MOST_DENSE_CELLS", -1)
    assert json.dumps(charts()) == json.dumps(here)
    monkeypatch.setattr(charting, "MOST_ROWS", 0)
    by_database = charts()
    for one, other in zip(here, by_database, strict=True):
        assert json.loads(json.dumps(one), parse_float=_rounded) == json.loads(
            json.dumps(other), parse_float=_rounded
        )


def _rounded(text: str) -> float:
    return round(float(text), 5)


def test_a_map_of_very_many_samples_comes_from_the_roll_up(
    folder: DataFolder, query: Query, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(
        folder,
        run,
        [sample("m", 9.0 if step == 777 else 1.0, step, rank=rank) for rank in (0, 1) for step in range(900)],
    )
    monkeypatch.setattr(grids, "MANY_ROWS", 0)
    heat = query.heatmap(run, Selection("m"), Window(pieces=15))
    assert (heat["width"], heat["from"], heat["to"]) == (100, 0, 899)
    assert heat["values"][:2] == [[1.0] * 7 + [9.0, 1.0]] * 2
    fine = query.heatmap(run, Selection("m"), Window(pieces=150))
    assert (fine["width"], fine["from"], fine["to"]) == (10, 0, 899)
    assert fine["values"][:2] == [[1.0] * 77 + [9.0] + [1.0] * 12] * 2


def test_the_widest_windows_and_the_most_columns_are_answered(folder: DataFolder, query: Query, run: str) -> None:
    send(folder, run, [sample("m", float(step > 0), step, rank=rank) for step in (0, 1_500_000) for rank in (0, 1)])
    whole = 2**62 - 1
    for pieces in (1, 2, 3, 1000):
        window = Window(-whole, whole, pieces)
        for axis in ("step", "time"):
            lines = query.series(run, Selection("m"), window, axis)["series"]
            assert [(max(line["max"]), sum(line["count"])) for line in lines] == [(1.0, 2), (1.0, 2)]
        values = query.heatmap(run, Selection("m"), window)["values"]
        assert [max(value for value in row if value is not None) for row in values[:2]] == [1.0, 1.0]
    for columns in (1_048_576, 1_048_577, 1_500_001):
        header, values = query._charts.heatmap(
            folder.registry.run(run), Selection("m", ranks=(1,)), Window(pieces=columns), "rank", "max"
        )
        assert header["to"] >= 1_500_000
        assert np.nanmax(values) == 1.0
        assert np.isfinite(values).sum() == 2


def test_a_window_shows_only_its_steps_and_rolled_up_means_agree(
    folder: DataFolder, query: Query, run: str
) -> None:
    send(folder, run, [sample("m", float(step), step, rank=0) for step in range(5000)])
    reply = query.series(run, Selection("m"), Window(1000, 1999, 10))
    (line,) = reply["series"]
    assert (reply["from"], reply["to"], reply["width"]) == (1000, 1999, 100)
    assert line["x"] == list(range(1000, 2000, 100))
    assert line["min"] == [float(x) for x in line["x"]]
    assert line["max"] == [float(x + 99) for x in line["x"]]
    rolled = query.series(run, Selection("m"), Window(pieces=10))
    (line,) = rolled["series"]
    assert rolled["width"] % 100 == 0
    for x, mean, count in zip(line["x"], line["mean"], line["count"], strict=True):
        assert mean == pytest.approx(np.arange(x, x + count).mean())
    assert query.series(run, Selection("m"), Window(6000, 7000))["series"] == []


def test_series_are_told_apart_and_chosen_by_rank_device_host_and_label(
    folder: DataFolder, query: Query, run: str
) -> None:
    records = [
        sample(
            "m", float(rank * 10 + layer), step, rank=rank, host="h", device=f"h/gpu{rank}",
            labels={"layer": str(layer)},
        )
        for rank in range(3) for layer in range(2) for step in range(4)
    ]  # fmt: skip
    send(folder, run, [*records, sample("m", 99.0, 0, host="other")])

    def values(**chosen: Any) -> list[tuple[int | None, str | None, float]]:
        reply = query.series(run, Selection("m", **chosen))
        return [(line["rank"], line["labels"].get("layer"), line["max"][0]) for line in reply["series"]]

    assert len(values()) == 7
    assert sorted(values(ranks=(1,))) == [(1, "0", 10.0), (1, "1", 11.0)]
    assert values(device="h/gpu2", labels={"layer": "1"}) == [(2, "1", 21.0)]
    assert values(host="other") == [(None, None, 99.0)]
    assert values(labels={"layer": "7"}) == []
    assert query.series(run, Selection("unheard.of"))["series"] == []


def test_values_that_are_no_numbers_are_shown_as_such_and_hide_nothing(
    folder: DataFolder, query: Query, run: str
) -> None:
    send(
        folder, run, [sample("m", value, step, rank=0) for step, value in enumerate([1.0, "NaN", "Infinity", 4.0])]
    )
    (line,) = query.series(run, Selection("m"))["series"]
    assert line["max"] == [1.0, "NaN", "Infinity", 4.0]
    assert line["odd"] == [0, 1, 1, 0]
    (line,) = query.series(run, Selection("m"), Window(pieces=1))["series"]
    assert (line["min"], line["max"], line["mean"], line["count"], line["odd"]) == ([1.0], [4.0], [2.5], [4], [2])
    heat = query.heatmap(run, Selection("m"))
    assert heat["values"][0] == [1.0, "NaN", "NaN", 4.0]
    json.dumps(heat, allow_nan=False)


def test_a_map_has_a_row_for_every_rank_and_a_gap_for_what_is_missing(
    folder: DataFolder, query: Query, run: str
) -> None:
    send(folder, run, [step_span(rank, step, 0.1 + rank) for rank in (0, 2) for step in range(10) if step != 5])
    heat = query.heatmap(run, Selection("step.duration"))
    assert heat["rows"] == [0, 1, 2]
    assert (heat["from"], heat["to"], heat["width"], heat["columns"], heat["unit"]) == (0, 9, 1, 10, "s")
    assert heat["values"][1] == [None] * 10
    assert heat["values"][2][5] is None
    assert heat["values"][2][4] == pytest.approx(2.1)
    pooled = query.heatmap(run, Selection("step.duration"), Window(pieces=2), pool="mean")
    assert pooled["values"][0] == [pytest.approx(0.1), pytest.approx(0.1)]


def test_the_binary_map_says_the_same_as_the_json_one(folder: DataFolder, query: Query, run: str) -> None:
    send(folder, run, [step_span(rank, step, 0.25 * (rank + 1)) for rank in (0, 2) for step in range(7)])
    body = query.heatmap_bytes(run, Selection("step.duration"))
    (length,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + length])
    values = np.frombuffer(body, "<f4", offset=4 + length).reshape(len(header["rows"]), header["columns"])
    heat = query.heatmap(run, Selection("step.duration"))
    assert header == {key: value for key, value in heat.items() if key != "values"}
    assert [[None if math.isnan(v) else v for v in row] for row in values.tolist()] == heat["values"]


def test_phases_of_micro_batches_add_up_to_one_duration_a_step(folder: DataFolder, query: Query, run: str) -> None:
    spans = [
        {
            "type": "span", "kind": "phase", "name": name, "rank": 0, "step": 1, "t0_ns": START + t0,
            "t1_ns": START + t0 + 10,
        }
        for name, t0 in [("forward", 0), ("backward", 10), ("forward", 20), ("backward", 30)]
    ]  # fmt: skip
    send(folder, run, spans)
    reply = query.series(run, Selection("phase.duration"))
    assert {line["labels"]["phase"]: line["max"] for line in reply["series"]} == {
        "forward": [2e-8],
        "backward": [2e-8],
    }
    only = query.series(run, Selection("phase.duration", labels={"phase": "forward"}))
    assert len(only["series"]) == 1


def test_samples_without_a_step_are_drawn_over_time_or_at_the_step_of_their_moment(
    folder: DataFolder, query: Query, run: str
) -> None:
    send(folder, run, [step_span(0, step) for step in range(5)])
    send(
        folder,
        run,
        [sample("hw.power", float(index), None, t_ns=START + index * SECOND // 2, rank=0) for index in range(10)],
    )
    send(folder, run, [sample("host.load", 7.0, None, t_ns=START + 3 * SECOND + 5, host="h")])
    by_time = query.series(run, Selection("hw.power"))
    assert by_time["axis"] == "time"
    assert by_time["series"][0]["x"][0] == START
    by_step = query.series(run, Selection("hw.power"), axis="step")
    assert by_step["series"][0]["x"] == [0, 1, 2, 3, 4]
    assert by_step["series"][0]["max"] == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert query.series(run, Selection("host.load"), axis="step")["series"][0]["x"] == [3]


def test_vectors_over_ranks_are_read_as_a_value_each(folder: DataFolder, query: Query, run: str) -> None:
    vector = {"type": "vector", "t_ns": START, "metric": "comm.wait", "labels": {"phase": "backward"}}
    send(folder, run, [{**vector, "step": step, "values": [0.1, 0.2, step * 1.0]} for step in range(3)])
    reply = query.series(run, Selection("comm.wait"))
    assert [(line["rank"], line["max"]) for line in reply["series"]] == [
        (0, [0.1] * 3), (1, [0.2] * 3), (2, [0.0, 1.0, 2.0]),
    ]  # fmt: skip
    assert [line["rank"] for line in query.series(run, Selection("comm.wait", ranks=(2,)))["series"]] == [2]


def test_tokens_of_experts_are_summed_over_ranks_and_mapped_by_layer(
    folder: DataFolder, query: Query, run: str
) -> None:
    def tokens(rank: int | None, layer: int, values: list[int]) -> dict[str, Any]:
        vector = {"type": "vector", "t_ns": START, "metric": "moe.expert.tokens", "step": 1, "layer": layer}
        return {**vector, "rank": rank, "values": values}

    send(folder, run, [tokens(0, 0, [1, 2]), tokens(1, 0, [10, 20]), tokens(0, 1, [5, 6])])
    heat = query.heatmap(run, Selection("moe.expert.tokens"), rows="expert")
    assert dict(zip(heat["rows"], heat["values"], strict=True)) == {
        "layer0/expert0": [11.0], "layer0/expert1": [22.0], "layer1/expert0": [5.0], "layer1/expert1": [6.0],
    }  # fmt: skip
    one = query.heatmap(run, Selection("moe.expert.tokens", labels={"layer": "1"}), rows="expert")
    assert one["rows"] == ["layer1/expert0", "layer1/expert1"]
    with pytest.raises(BadQueryError, match="experts"):
        query.series(run, Selection("moe.expert.tokens"))


def test_devices_are_rows_too(folder: DataFolder, query: Query, run: str) -> None:
    send(folder, run, [sample("hw.temperature", 60.0 + gpu, 1, device=f"h/gpu{gpu}", host="h") for gpu in range(2)])
    heat = query.heatmap(run, Selection("hw.temperature"), rows="device")
    assert (heat["rows"], heat["values"]) == (["h/gpu0", "h/gpu1"], [[60.0], [61.0]])


def test_a_step_shows_the_lanes_of_all_ranks(folder: DataFolder, query: Query, run: str) -> None:
    collective = {
        "type": "span", "kind": "collective", "name": "all_reduce", "rank": 1, "step": 4, "t0_ns": START + 5,
        "t1_ns": START + 9, "attrs": {"group": "dp/0", "seq": 8, "bytes": 64},
    }  # fmt: skip
    send(folder, run, [step_span(1, 4), step_span(0, 4), step_span(0, 5), collective])
    shown = query.step(run, 4)
    assert [lane["rank"] for lane in shown["ranks"]] == [0, 1]
    assert shown["ranks"][1]["spans"] == [
        {
            "kind": "collective", "name": "all_reduce", "t0_ns": START + 5, "t1_ns": START + 9, "group": "dp/0",
            "seq": 8, "bytes": 64,
        }
    ]  # fmt: skip
    with pytest.raises(UnknownStepError):
        query.step(run, 99)


def collective(rank: int, start: float, stop: float, seq: int = 1, **attrs: Any) -> dict[str, Any]:
    """A collective of step 1 between two seconds of it."""
    begin = START + SECOND
    times = {"t0_ns": begin + int(start * SECOND), "t1_ns": begin + int(stop * SECOND)}
    more = {"group": "world/0", "seq": seq, **attrs}
    return {
        "type": "span",
        "kind": "collective",
        "name": "all_reduce",
        "rank": rank,
        "step": 1,
        **times,
        "attrs": more,
    }


def test_the_lanes_say_when_an_asynchronous_collective_began_to_hold_its_rank(
    folder: DataFolder, query: Query, run: str
) -> None:
    waited, done = START + SECOND * 5 // 4, START + SECOND * 3 // 2
    beside = collective(0, 0.1, 0.5, **{"async": True, "t_wait_ns": waited, "t_done_ns": done})
    send(folder, run, [step_span(0, 1), beside, collective(0, 0.6, 0.7, seq=2)])
    (lane,) = query.step(run, 1)["ranks"]
    first, second = lane["spans"]
    assert (first["async"], first["t_wait_ns"], first["t_done_ns"]) == (True, waited, done)
    assert "async" not in second
    assert "t_wait_ns" not in second


def test_own_time_is_what_collectives_leave_of_a_step(folder: DataFolder, query: Query, run: str) -> None:
    """Rank 0 is held twice, overlapping; rank 1 only while it waits; rank 2 has recorded no collective."""
    send(
        folder,
        run,
        [
            *(step_span(rank, 1, seconds=1.0) for rank in range(3)),
            collective(0, 0.1, 0.5),
            collective(0, 0.4, 0.6, seq=2),
            collective(1, 0.1, 0.5, **{"async": True, "t_wait_ns": START + SECOND * 14 // 10}),
            collective(1, 0.6, 0.9, seq=2, **{"async": True}),
        ],
    )
    heat = query.heatmap(run, Selection("step.self"))
    assert [row[0] for row in heat["values"]] == [pytest.approx(0.5), pytest.approx(0.9), None]
    assert "step.self" in [each["metric"] for each in query.run(run)["metrics"]]


def test_own_time_of_a_pre_reduced_run_is_the_sum_over_its_groups(
    folder: DataFolder, query: Query, run: str
) -> None:
    vector = {"type": "vector", "t_ns": START, "metric": "comm.self", "step": 1}
    parts = [
        {**vector, "values": [0.1, 0.2], "labels": {"group": "dp"}},
        {**vector, "values": [0.3, 0.4], "labels": {"group": "ep"}},
    ]
    send(folder, run, [*parts, *(step_span(rank, 1) for rank in range(2))])
    heat = query.heatmap(run, Selection("step.self"))
    assert [row[0] for row in heat["values"]] == [pytest.approx(0.4), pytest.approx(0.6), None]


def test_the_newest_values_of_several_metrics_come_in_one_answer(
    folder: DataFolder, query: Query, run: str
) -> None:
    send(folder, run, [sample("a", 1.0, 1, rank=0), sample("a", 2.0, 2, rank=0), sample("b", 3.0, 1, rank=1)])
    found = {(each["metric"], each["rank"]): each["value"] for each in query.latest(run, "a", "b", "nowhere")}
    assert found == {("a", 0): 2.0, ("b", 1): 3.0}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(0, 20)), max_size=30))
def test_the_union_of_intervals_counts_each_moment_once(intervals: list[tuple[int, int, int]]) -> None:
    group, begin, length = (
        (np.array(part, np.int64) for part in zip(*intervals, strict=True))
        if intervals
        else [np.empty(0, np.int64)] * 3
    )
    found = covered(begin, begin + length, group)
    moments = {(g, moment) for g, b, n in intervals for moment in range(b, b + n)}
    for each in range(len(found)):
        assert found[each] == sum(g == each for g, _ in moments)


def test_an_open_span_gives_way_to_its_end(folder: DataFolder, query: Query, run: str) -> None:
    began = {
        "type": "span",
        "kind": "collective",
        "name": "all_reduce",
        "rank": 0,
        "step": 4,
        "t0_ns": START,
        "t1_ns": None,
    }
    other = {**began, "rank": 1}
    send(folder, run, [began, other, other])
    assert query.tables(run)[1].collectives["t1_ns"].tolist() == [NULL, NULL]
    send(folder, run, [{**began, "t1_ns": START + 50}])
    tables = query.tables(run)[1]
    assert sorted(zip(tables.collectives["rank"].tolist(), tables.collectives["t1_ns"].tolist(), strict=True)) == [
        (0, START + 50), (1, NULL),
    ]  # fmt: skip


def test_up_to_a_step_means_what_could_be_known_by_its_end(folder: DataFolder, query: Query, run: str) -> None:
    spans = [step_span(rank, step) for rank in (0, 1) for step in range(4)]
    stepped = [sample("train.loss", 1.0, step, rank=0) for step in range(4)]
    timed = [sample("hw.power", 1.0, None, t_ns=START + half * SECOND // 2 + 1, rank=0) for half in range(12)]
    send(folder, run, [*spans, *stepped, *timed])

    def seen(upto: int | None) -> tuple[list[int], list[int], int]:
        tables = query.tables(run, upto)[1]
        with_step = tables.samples["step"] != NULL
        return (
            sorted(set(tables.steps["step"].tolist())),
            sorted(tables.samples["step"][with_step].tolist()),
            int((~with_step).sum()),
        )

    # The last step up to 1 ends at 1.5 s; samples lie at 0, 0.5, 1, 1.5 s … and a nanosecond.
    assert seen(1) == ([0, 1], [0, 1], 3)
    assert seen(2) == ([0, 1, 2], [0, 1, 2], 5)
    assert seen(3) == seen(None) == seen(100) == ([0, 1, 2, 3], [0, 1, 2, 3], 12)


def test_a_run_says_how_far_it_is_and_who_reports(folder: DataFolder, query: Query, run: str) -> None:
    send(folder, run, [step_span(rank, step) for rank in (0, 1) for step in range(5)])
    send(folder, run, [step_span(0, 5, t1_ns=None), {"type": "nonsense"}])
    assert query.run(run)["drops"] == {"lost_slots": 0, "given_up": None, "rejected": 1}
    given_up = {"type": "sample", "metric": "lens.collector.dropped"}
    send(folder, run, [{**given_up, "host": host, "t_ns": START + t, "value": value} for host, t, value in
                       (("a", 1, 3), ("a", 2, 7), ("b", 1, 5), ("c", 1, "NaN"))])  # fmt: skip
    (summary,) = query.runs()
    assert (summary["run"], summary["world_size"], summary["last_step"]) == ("r", 3, 4)
    assert (summary["ranks_reporting"], summary["state"], summary["started_ns"]) == (2, "live", START)
    assert summary["age_s"] < 60
    detail = query.run(run)
    assert detail["drops"] == {"lost_slots": 0, "given_up": 12, "rejected": 1}
    assert {entry["metric"] for entry in detail["metrics"]} >= {"step.duration", "phase.duration"}
    exits = [
        {
            "type": "event",
            "kind": "process.exit",
            "t_ns": START + 9 * SECOND,
            "rank": rank,
            "attrs": {"exit_code": 0},
        }
        for rank in (0, 1)
    ]
    send(folder, run, exits)
    assert query.runs()[0]["state"] == "ended"
    assert query.runs()[0]["ranks_reporting"] == 2


def test_a_rank_that_ended_or_fell_silent_no_longer_reports(folder: DataFolder, query: Query, run: str) -> None:
    send(folder, run, [step_span(rank, 0) for rank in range(3)])
    send(folder, run, [{"type": "event", "kind": "process.exit", "t_ns": START + SECOND, "rank": 2}])
    assert query.runs()[0]["ranks_reporting"] == 2
    send(folder, run, [step_span(0, step) for step in range(1, 60)])
    assert query.runs()[0]["ranks_reporting"] == 1


def test_what_is_known_of_a_run_survives_a_restart(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.describe_run({"run": "r", "world_size": 2, "name": "first"})
    send(folder, "r", [step_span(0, 3), sample("train.loss", 1.0, 3, rank=0), {"type": "nonsense"}])
    before = Query(folder).run("r")
    folder.close()
    query = Query.open_folder(tmp_path)
    after = query.run("r")
    for known in (before, after):
        known.pop("age_s")
        known.pop("state")
    assert after == before
    query.close()


def test_runs_come_newest_first_and_an_unknown_one_is_an_error(folder: DataFolder, query: Query) -> None:
    for name in ("a", "b", "c"):
        folder.describe_run({"run": name})
    assert [entry["run"] for entry in query.runs()] == ["c", "b", "a"]
    for ask in (query.run, query.tables, query.diagnosis, query.ledger):
        with pytest.raises(UnknownRunError):
            ask("nobody")


def test_an_answer_is_kept_until_something_new_is_known(folder: DataFolder) -> None:
    asked: list[tuple[str, ...]] = []

    rows = 0

    def evaluate(names: Any, run: dict[str, Any], update: Update, upto: int | None) -> list[dict[str, Any]]:
        nonlocal rows
        asked.append(tuple(names))
        rows += sum(part.total for part in update.parts)
        return [{"of": name, "rows": rows} for name in names]

    query = Query(folder, evaluate)
    folder.describe_run({"run": "r"})
    assert query.diagnosis("r") == query.diagnosis("r") == {"of": "diagnose", "rows": 0}
    assert len(asked) == 1
    send(folder, "r", [step_span(0, 0)])
    assert query.verdict("r") == ({"of": "diagnose", "rows": 1}, {"of": "ledger", "rows": 1})
    assert query.diagnosis("r")["rows"] == 1
    assert asked == [("diagnose",), ("diagnose", "ledger")]
