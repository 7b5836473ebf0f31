"""OTLP and Prometheus: what their own senders write can be read as any other metric, once, and can be scraped."""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.store.bridges import otlp, remote_write
from lens.store.bridges.protobuf import read
from lens.store.errors import TooLargeError, UndecodableError

from .conftest import TOKEN
from .helpers import START, ndjson, sample, step_span
from .processes import Server

JSON, PROTOBUF = {"content-type": "application/json"}, {"content-type": "application/x-protobuf"}


def attributes(**values: Any) -> list[dict[str, Any]]:
    return [{"key": key.replace("__", "."), "value": {"stringValue": str(value)}} for key, value in values.items()]


def request(*metrics: dict[str, Any], **resource: Any) -> dict[str, Any]:
    of = {"attributes": attributes(**resource)}
    return {"resourceMetrics": [{"resource": of, "scopeMetrics": [{"metrics": list(metrics)}]}]}


def gauge(name: str, value: Any, t_ns: int = START, **more: Any) -> dict[str, Any]:
    point = {"timeUnixNano": str(t_ns), "asDouble": value, "attributes": attributes(**more)}
    return {"name": name, "gauge": {"dataPoints": [point]}}


def rows(client: TestClient, run: str, columns: str = "metric, value") -> list[list[Any]]:
    sql = f"SELECT {columns} FROM samples ORDER BY metric, value"
    found: list[list[Any]] = client.post("/api/v1/query", json={"sql": sql, "run": run}).json()["rows"]
    return found


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def part(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def write_request(*series: tuple[dict[str, str], Iterable[tuple[float, int]]]) -> bytes:
    """A remote write body, made by hand as the protocol says."""
    body = b""
    for labels, samples in series:
        pairs = (part(1, name.encode()) + part(2, value.encode()) for name, value in labels.items())
        inner = b"".join(part(1, pair) for pair in pairs)
        for value, t_ms in samples:
            inner += part(2, b"\x09" + struct.pack("<d", value) + b"\x10" + varint(t_ms % 2**64))
        body += part(1, inner)
    packed: bytes = pa.Codec("snappy").compress(body, asbytes=True)
    return packed


def test_a_real_opentelemetry_program_is_stored_and_shown(tmp_path: Path) -> None:
    exporter = pytest.importorskip("opentelemetry.exporter.otlp.proto.http.metric_exporter")
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    resources = pytest.importorskip("opentelemetry.sdk.resources")
    with Server(tmp_path / "data") as server, server.client() as client:
        target = exporter.OTLPMetricExporter(
            endpoint=f"http://127.0.0.1:{server.port}/v1/metrics",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=100,
        )
        resource = resources.Resource.create({"service.name": "trainer", "host.name": "h1"})
        provider = sdk.MeterProvider([export.PeriodicExportingMetricReader(target)], resource)
        meter = provider.get_meter("test")
        meter.create_counter("app.tokens").add(5, {"rank": 1})
        meter.create_gauge("app.temperature").set(71.5)
        latency = meter.create_histogram("app.latency")
        for seconds in (0.1, 3.0):
            latency.record(seconds)
        assert provider.force_flush(100_000)
        provider.shutdown()
        sql = "SELECT metric, rank, host, value FROM latest WHERE labels['le'] IN ('', '5') ORDER BY metric"
        found = client.post("/api/v1/query", json={"sql": sql, "run": "trainer"}).json()["rows"]
        assert found == [
            ["app.latency.bucket", None, "h1", 2.0],
            ["app.latency.count", None, "h1", 2.0],
            ["app.latency.max", None, "h1", 3.0],
            ["app.latency.min", None, "h1", 0.1],
            ["app.latency.sum", None, "h1", 3.1],
            ["app.temperature", None, "h1", 71.5],
            ["app.tokens", 1, "h1", 5.0],
        ]
        series = client.get("/api/v1/runs/trainer/series", params={"metric": "app.temperature"}).json()
        assert (series["axis"], set(series["series"][0]["max"])) == ("time", {71.5})


def test_json_points_say_whose_they_are_and_where_they_go(client: TestClient) -> None:
    body = request(
        gauge("my.loss", 1.5, rank=3, step=7, layer="2"),
        gauge("odd name é!", "NaN"),
        gauge("elsewhere", 2.0, lens__run="other"),
        service__name="trainer", host__name="h1", telemetry__sdk__name="x",
    )  # fmt: skip
    reply = client.post("/v1/metrics", json=body)
    assert (reply.status_code, reply.json()) == (200, {})
    assert rows(client, "trainer", "metric, value, rank, host, step, labels") == [
        ["my.loss", 1.5, 3, "h1", 7, {"layer": "2"}],
        ["odd.name...", "NaN", None, "h1", None, {}],
    ]
    assert rows(client, "other") == [["elsewhere", 2.0]]
    client.post("/v1/metrics?run=asked", json=request(gauge("a", 1.0), service__name="trainer"))
    assert rows(client, "asked") == [["a", 1.0]]


def test_points_that_cannot_be_taken_are_told_and_cost_no_others(client: TestClient) -> None:
    delta = {"name": "d", "sum": {"aggregationTemporality": 1, "dataPoints": [{}, {}]}}
    no_time = {"name": "t", "gauge": {"dataPoints": [{"asDouble": 1}]}}
    no_value = {"name": "v", "gauge": {"dataPoints": [{"timeUnixNano": "1", "flags": 1}]}}
    uneven = {"name": "h", "histogram": {"aggregationTemporality": 2, "dataPoints": [
        {"timeUnixNano": "1", "bucketCounts": ["1"], "explicitBounds": [1, 2]}]}}  # fmt: skip
    body = request(delta, no_time, no_value, uneven, {"gauge": {}}, gauge("good", 1.0), service__name="r")
    reply = client.post("/v1/metrics", json=body).json()["partialSuccess"]
    assert reply["rejectedDataPoints"] == "5"
    assert "cumulative" in reply["errorMessage"]
    assert rows(client, "r") == [["good", 1.0]]


def test_a_request_sent_again_is_stored_once(client: TestClient) -> None:
    body = json.dumps(request(gauge("a", 1.0), service__name="r"))
    for _ in range(3):
        assert client.post("/v1/metrics", content=body, headers=JSON).status_code == 200
    written = write_request(({"__name__": "up", "job": "r"}, [(1.0, START // 10**6)]))
    for _ in range(3):
        assert client.post("/api/v1/write", content=written, headers=PROTOBUF).status_code == 204
    assert rows(client, "r") == [["a", 1.0], ["up", 1.0]]
    assert client.post(
        "/v1/metrics?run=other", content=json.dumps(request(gauge("a", 1.0))), headers=JSON
    ).is_success
    assert client.post(
        "/v1/metrics?run=third", content=json.dumps(request(gauge("a", 1.0))), headers=JSON
    ).is_success
    assert rows(client, "other") == rows(client, "third") == [["a", 1.0]], "the same bytes for another run"


def test_remote_write_is_stored_without_its_marks_of_the_end(client: TestClient) -> None:
    (stale,) = struct.unpack("<d", bytes.fromhex("020000000000f07f"))
    t_ms = START // 10**6
    labels = {"__name__": "node:cpu_total", "job": "node", "instance": "h1:9100", "rank": "2", "mode": "idle"}
    body = write_request(
        (labels, [(1.0, t_ms), (math.nan, t_ms + 1), (stale, t_ms + 2)]), ({"job": "x"}, [(1.0, 5)])
    )
    assert client.post("/api/v1/write", content=body, headers=PROTOBUF).status_code == 204
    assert rows(client, "node", "metric, value, rank, host, labels, t_ns") == [
        ["node.cpu_total", 1.0, 2, "h1:9100", {"job": "node", "mode": "idle"}, START],
        ["node.cpu_total", "NaN", 2, "h1:9100", {"job": "node", "mode": "idle"}, START + 10**6],
    ]
    for bad in (b"", b"\xff\xff\xff\xff\x0f", b"\x05abc", write_request(({"job": "x"}, [(1.0, 5)]))):
        reply = client.post("/api/v1/write", content=bad, headers=PROTOBUF)
        assert reply.status_code in (204, 400, 413), reply.text
    v2 = {"content-type": "application/x-protobuf;proto=io.prometheus.write.v2.Request"}
    assert client.post("/api/v1/write", content=body, headers=v2).status_code == 415


LINE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\]|\\.)*",?)*)\})? (NaN|[+-]Inf|[-+.\de]+)')


def scraped(client: TestClient, **params: str) -> dict[tuple[str, str], float]:
    reply = client.get("/metrics", params=params)
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for line in reply.text.splitlines():
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, line
            key = match[1], match[2] or ""
            assert key not in found, "no series twice"
            found[key] = float(match[3])
    return found


def test_newest_values_findings_and_health_can_be_scraped(client: TestClient) -> None:
    client.post("/api/v1/runs", json={"run": 'r"1', "world_size": 2})
    now = time.time_ns()
    records = [
        *(
            sample("hw.power", 100.0 + k, host="h", device="h/gpu0", labels={"run": "x"}, t_ns=now + k)
            for k in range(3)
        ),
        sample("train.loss", "NaN", 1, rank=1, t_ns=now),
        sample("lens_scraped_before", 1.0, t_ns=now),
        sample("my/own-metric", -2.5, t_ns=now),
        *(step_span(rank, step, 0.1, t0_ns=now + step * 10**8) for rank in (0, 1) for step in range(3)),
    ]
    client.post(
        "/api/v1/runs/r%221/records", content=ndjson(records), headers={"content-type": "application/x-ndjson"}
    )
    client.get("/api/v1/runs/r%221/latest", params={"metric": "train.loss"})  # waits until it can be read
    found = scraped(client)
    assert found["lens_hw_power_watts", r'device="h/gpu0",exported_run="x",host="h",run="r\"1"'] == 102.0
    assert math.isnan(found["lens_train_loss_ratio", r'rank="1",run="r\"1"'])
    assert found["lens_my_own_metric", r'run="r\"1"'] == -2.5
    assert found["lens_run_last_step", r'run="r\"1"'] == 2
    assert found["lens_server_healthy", ""] == 1
    assert not any("scraped_before" in name for name, _ in found)
    assert ("lens_run_world_size", r'run="r\"1"') in scraped(client, run='r"1')
    assert client.get("/metrics", params={"run": "nobody"}).status_code == 404


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_bring_the_readers_down(body: bytes) -> None:
    for attempt in (
        lambda: otlp.gather(body, otlp.PROTOBUF, None),
        lambda: otlp.gather(body, otlp.JSON, None),
        lambda: remote_write.gather(body, None, 1 << 20),
        lambda: remote_write.gather(pa.Codec("snappy").compress(body, asbytes=True), None, 1 << 20),
    ):
        with contextlib.suppress(UndecodableError, TooLargeError):
            attempt()


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["resourceMetrics", "scopeMetrics", "metrics", "name", "gauge", "sum", "histogram", "summary",
                         "dataPoints", "asInt", "asDouble", "timeUnixNano", "attributes", "key", "value", "stringValue",
                         "bucketCounts", "explicitBounds", "quantileValues", "flags", "count", "resource",
                         "aggregationTemporality"]), inner, max_size=4),
    max_leaves=30,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(_json)
def test_no_json_brings_otlp_down_or_costs_the_good_points(odd: Any) -> None:
    good = gauge("good", 1.0)
    for body in (odd, request(good, odd) if isinstance(odd, dict) else request(good), {"resourceMetrics": [odd]}):
        try:
            gathered = otlp.gather(json.dumps(body).encode(), otlp.JSON, "r")
        except UndecodableError:
            continue
        if isinstance(body, dict) and body.get("resourceMetrics") == request(good)["resourceMetrics"]:
            assert b"".join(gathered.lines["r"]).count(b'"good"') == 1


def test_protobuf_is_read_packed_or_not_and_refused_when_cut_short() -> None:
    messages = {"M": {1: ("numbers", "fixed64*"), 2: ("text", "string"), 3: ("inner", "M"), 4: ("sign", "int")}}
    packed = part(1, struct.pack("<2Q", 1, 2)) + b"\x09" + struct.pack("<Q", 3) + part(9, b"unknown")
    body = packed + part(2, b"x") + part(3, part(2, b"y")) + b"\x20" + varint(2**64 - 1)
    assert read(body, "M", messages) == {"numbers": [1, 2, 3], "text": "x", "inner": {"text": "y"}, "sign": -1}
    for cut in range(1, 18):
        with pytest.raises(UndecodableError):
            read(body[:cut], "M", messages)
    deep = b""
    for _ in range(100):
        deep = part(3, deep)
    with pytest.raises(UndecodableError, match="deep"):
        read(deep, "M", messages)
