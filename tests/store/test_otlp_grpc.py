"""OTLP over gRPC: what the real exporter sends arrives as over HTTP, and nobody sends without a token for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from lens.settings import Settings
from lens.store.app import create_app
from lens.store.tokens import READ, Tokens

from .conftest import TOKEN

grpc = pytest.importorskip("grpc")
exporters = pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.metric_exporter")
sdk = pytest.importorskip("opentelemetry.sdk.metrics")
export = pytest.importorskip("opentelemetry.sdk.metrics.export")
resources = pytest.importorskip("opentelemetry.sdk.resources")


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    headers = {"authorization": f"Bearer {TOKEN}"}
    app = create_app(settings, otlp_grpc="127.0.0.1:0")
    with TestClient(app, base_url="http://127.0.0.1:8321", headers=headers) as found:
        yield found


def target(client: TestClient) -> str:
    return f"127.0.0.1:{client.app.state.otlp_grpc_port}"  # type: ignore[attr-defined]


def test_a_real_opentelemetry_program_sends_over_grpc(client: TestClient) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    exporter = exporters.OTLPMetricExporter(
        endpoint=f"http://{target(client)}", insecure=True, headers=headers, timeout=100
    )
    provider = sdk.MeterProvider(
        [export.PeriodicExportingMetricReader(exporter)], resources.Resource.create({"service.name": "trainer"})
    )
    meter = provider.get_meter("test")
    meter.create_gauge("app.temperature").set(71.5, {"rank": 3, "step": 7})
    meter.create_counter("app.tokens").add(5)
    assert provider.force_flush(100_000)
    provider.shutdown()
    asked = {"run": "trainer", "sql": "SELECT metric, rank, step, value FROM samples GROUP BY ALL ORDER BY metric"}
    rows = client.post("/api/v1/query", json=asked).json()["rows"]
    assert rows[0] == ["app.temperature", 3, 7, 71.5]
    assert {tuple(row) for row in rows[1:]} == {("app.tokens", None, None, 5.0)}


def test_calls_without_a_token_for_it_and_bodies_that_are_none_are_refused_as_grpc_has_it(
    client: TestClient, settings: Settings
) -> None:
    reader = Tokens(settings.data).add("ana", [READ])
    refused: list[tuple[Any, bytes, str]] = [
        ((), b"", "UNAUTHENTICATED"),
        ((("authorization", "Bearer wrong"),), b"", "UNAUTHENTICATED"),
        ((("authorization", f"Bearer {reader}"),), b"", "PERMISSION_DENIED"),
        ((("authorization", f"Bearer {TOKEN}"),), b"\xff\xff", "INVALID_ARGUMENT"),
    ]
    with grpc.insecure_channel(target(client)) as channel:
        call = channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")
        for metadata, body, code in refused:
            with pytest.raises(grpc.RpcError) as told:
                call(body, metadata=metadata, timeout=100)
            assert told.value.code().name == code
        assert call(b"", metadata=(("authorization", f"Bearer {TOKEN}"),), timeout=100) == b""
