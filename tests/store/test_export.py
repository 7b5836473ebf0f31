"""Export: every record in the file, absent values absent, a trace with one process a rank."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from lens.store.engine import Store
from lens.store.export import rows
from lens.store.export.rows import ORDER

from .helpers import SECOND, START, ndjson, sample, step_span

SPAN = {"type": "span", "t0_ns": START, "t1_ns": START + SECOND, "rank": 0, "step": 0}


@pytest.fixture
def run(client: TestClient) -> str:
    client.post("/api/v1/runs", json={"run": "r é", "world_size": 2, "ranks": [{"rank": 0, "host": "h0"}]})
    attrs = {"group": "dp/0", "seq": 1, "bytes": 64, "async": True, "t_done_ns": START + 2 * SECOND}
    records = [
        *(step_span(rank, step, 0.25) for rank in (0, 1) for step in range(5)),
        *(sample("train.loss", 2.0 - step, step, rank=0) for step in range(5)),
        sample("hw.power", 300.0, host="h0", device="h0/gpu0", t_ns=START + 3 * SECOND, labels={"hw.type": "gpu"}),
        {**SPAN, "kind": "phase", "name": "forward", "t1_ns": START + SECOND // 4},
        {**SPAN, "kind": "phase", "name": "backward", "t0_ns": START + SECOND // 4, "t1_ns": None},
        {**SPAN, "kind": "collective", "name": "all_reduce", "attrs": attrs},
        {"type": "vector", "t_ns": START, "metric": "moe.expert.tokens", "values": [1, "NaN"], "layer": 1},
        {
            "type": "event",
            "t_ns": START,
            "kind": "gpu.xid",
            "severity": "error",
            "text": 'boo, "quoted"',
            "rank": 1,
        },
    ]
    reply = client.post(
        "/api/v1/runs/r%20%C3%A9/records", content=ndjson(records), headers={"content-type": "application/x-ndjson"}
    )
    assert reply.json() == {"accepted": len(records), "rejected": []}
    return "/api/v1/runs/r%20%C3%A9/export"


def test_parquet_and_arrow_hold_a_table_with_its_types(client: TestClient, run: str) -> None:
    reply = client.get(run, params={"format": "parquet"})
    assert 'filename="r_.samples.parquet"' in reply.headers["content-disposition"]
    table = pq.read_table(io.BytesIO(reply.content))
    assert table.num_rows == 6
    assert table.column("metric").to_pylist() == ["hw.power"] + ["train.loss"] * 5
    assert table.column("rank").to_pylist() == [None] + [0] * 5
    assert table.column("value").to_pylist() == [300.0, 2.0, 1.0, 0.0, -1.0, -2.0]
    streamed = client.get(run, params={"format": "arrow", "metric": "train.loss"}).content
    assert pa.ipc.open_stream(streamed).read_all().num_rows == 5


def test_metrics_read_together_or_one_by_one_are_the_same_file(
    client: TestClient, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in ("samples", "vectors"):
        monkeypatch.setattr(rows, "ROWS_AT_ONCE", 1_000_000)
        together = client.get(run, params={"format": "csv", "table": table}).content
        monkeypatch.setattr(rows, "ROWS_AT_ONCE", 1)
        assert client.get(run, params={"format": "csv", "table": table}).content == together


def test_names_come_back_to_their_rows_however_the_series_lie(client: TestClient) -> None:
    client.post("/api/v1/runs", json={"run": "many"})
    sent = [
        sample(metric, step + 100 * rank, step, rank=rank, host=host, labels=labels)
        for step in range(3) for rank in (1, 0) for metric in ("b.m", "a.m") for host in ("h1", None)
        for labels in ({"k": "z"}, {"k": "a"}, None)
    ]  # fmt: skip
    sent += [sample("a.m", 7.0, None, t_ns=START)]
    headers = {"content-type": "application/x-ndjson"}
    client.post("/api/v1/runs/many/records", content=ndjson(sent), headers=headers)
    reply = client.get("/api/v1/runs/many/export", params={"format": "arrow", "compression": "lz4"})
    found = pa.ipc.open_stream(reply.content).read_all().to_pylist()
    keys = ("metric", "host", "labels", "rank", "step", "t_ns", "value")

    def known(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(tuple(dict(row.get(key) or {}).items()) if key == "labels" else row.get(key) for key in keys)

    def place(row: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple((value is not None, value) for value in row)

    assert [known(row) for row in found] == sorted(map(known, sent), key=place)


def test_a_run_that_has_not_changed_is_not_read_again(
    client: TestClient, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    stream = Store.stream

    def noted(self: Store, sql: str, rows: int) -> Any:
        read.append(sql)
        return stream(self, sql, rows)

    monkeypatch.setattr(Store, "stream", noted)
    first, second = (client.get(run, params={"format": "arrow", "metric": "train.loss"}).content for _ in range(2))
    assert (first, len(read)) == (second, 1)
    client.post(
        run.replace("export", "records"),
        content=ndjson([sample("train.loss", -3.0, 5, rank=0)]),
        headers={"content-type": "application/x-ndjson"},
    )
    third = client.get(run, params={"format": "arrow", "metric": "train.loss"}).content
    assert pa.ipc.open_stream(third).read_all().column("value").to_pylist() == [2.0, 1.0, 0.0, -1.0, -2.0, -3.0]


def test_csv_quotes_what_it_must_and_leaves_absent_values_empty(client: TestClient, run: str) -> None:
    def rows(table: str, **more: Any) -> list[dict[str, str]]:
        text = client.get(run, params={"format": "csv", "table": table, **more}).text
        return list(csv.DictReader(io.StringIO(text)))

    (event,) = rows("events")
    assert (event["text"], event["step"], event["severity"]) == ('boo, "quoted"', "", "error")
    (vector,) = rows("vectors")
    assert json.loads(vector["values"]) == [1, "nan"]
    assert [row["step"] for row in rows("steps", **{"from": 1, "to": 2})] == ["1", "1", "2", "2"]
    within = rows("samples", **{"from": 3, "to": 3})
    assert [(row["metric"], row["labels"]) for row in within] == [
        ("hw.power", '{"hw.type":"gpu"}'),
        ("train.loss", "{}"),
    ]
    assert rows("collectives", **{"from": 4}) == []


def test_all_tables_come_as_one_archive(client: TestClient, run: str) -> None:
    packed = zipfile.ZipFile(io.BytesIO(client.get(run, params={"table": "all"}).content))
    assert packed.testzip() is None
    assert set(packed.namelist()) == {"run.json", *(f"{table}.parquet" for table in ORDER)}
    counts = {table: pq.read_table(io.BytesIO(packed.read(f"{table}.parquet"))).num_rows for table in ORDER}
    assert counts == {"samples": 6, "steps": 10, "spans": 2, "collectives": 1, "vectors": 1, "events": 1}
    assert json.loads(packed.read("run.json"))["world_size"] == 2


def test_a_trace_has_a_process_a_rank_and_every_span_in_its_place(client: TestClient, run: str) -> None:
    reply = client.get(run, params={"format": "perfetto"})
    assert reply.headers["content-type"] == "application/gzip"
    trace = json.loads(gzip.decompress(reply.content))
    assert trace["otherData"]["t0_ns"] == START
    events = trace["traceEvents"]

    def of(kind: str) -> list[dict[str, Any]]:
        return [event for event in events if event.get("cat") == kind]

    assert {(event["pid"], event["ts"], event["dur"]) for event in of("step")} == {
        (rank, step * 1e6, 0.25e6) for rank in (0, 1) for step in range(5)
    }
    forward, backward = of("phase")
    assert (forward["ph"], backward["ph"], "dur" in backward) == ("X", "B", False), "an open span stays open"
    begin, end = of("collective")
    assert (begin["ph"], end["ph"], end["ts"], begin["args"]["seq"]) == ("b", "e", 2e6, 1)
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {tracks[event["pid"], event["tid"]] for event in events if event["ph"] in "Xbi"} == {
        "steps", "phases", "dp/0", "events",
    }  # fmt: skip
    assert [e["args"]["value"] for e in events if e["ph"] == "C" and e["name"] == "train.loss"] == [2, 1, 0, -1, -2]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["rank 0 · h0"]


@pytest.mark.parametrize(
    ("params", "status"),
    [
        ({"format": "xlsx"}, 422), ({"table": "batches"}, 422), ({"from": 3, "to": 2}, 400),
        ({"table": "steps", "metric": "m"}, 400), ({"format": "csv", "compression": "lz4"}, 400),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_said(client: TestClient, run: str, params: dict[str, Any], status: int) -> None:
    reply = client.get(run, params=params)
    assert reply.status_code == status
    assert reply.json().keys() == {"error", "hint"}
    assert client.get("/api/v1/runs/nobody/export").status_code == 404
