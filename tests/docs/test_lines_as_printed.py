"""A plain curl, an OpenTelemetry SDK and a Prometheus write and read with the lines that the pages print.

A real Prometheus is asked where one is installed (`prometheus` on the PATH); a client written after the remote write
protocol, with the address and the token of the page, is asked everywhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.store.conftest import TOKEN
from tests.store.processes import Server
from tests.store.test_bridges import write_request

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = shutil.which("prometheus")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("lines") / "data") as started:
        yield started


def lines(page: str, kind: str, word: str, server: Server) -> str:
    """The first block of a page that has this word, with this server's address and token."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    block: str = next(block for of_kind, block in blocks if of_kind == kind and word in block)
    block = re.sub(r"(127\.0\.0\.1|localhost):8321", f"127.0.0.1:{server.port}", block)
    return block.replace("cat lens-data/token", f"cat {server.data}/token").replace(
        "=Bearer%20TOKEN", f"=Bearer%20{TOKEN}"
    )


def shell(text: str) -> list[Any]:
    """Run the lines; what each curl answered."""
    done = subprocess.run(
        ["bash", "-ec", text], capture_output=True, text=True, timeout=120, env={**os.environ, "TOKEN": TOKEN}
    )
    assert done.returncode == 0, done.stderr
    decoder, rest, found = json.JSONDecoder(), done.stdout.strip(), []
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(value)
        rest = rest[end:].strip()
    return found


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")


@needs_curl
def test_curl_sends_records_and_reads_runs(server: Server) -> None:
    run, receipt = shell(lines("records.md", "", "runs/mine/records", server))
    assert (run["run"], receipt) == ("mine", {"accepted": 1, "rejected": []})
    (runs,) = shell(lines("api.md", "", "curl", server))
    assert "mine" in [each["run"] for each in runs["runs"]]


@needs_curl
def test_curl_and_an_opentelemetry_program_send_to_one_run_and_curl_reads_it_back(server: Server) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.metric_exporter")
    assert shell(lines("bridges.md", "", "resourceMetrics", server)) == [{}]
    named = dict(line.split("=", 1) for line in lines("bridges.md", "", "OTEL_SERVICE_NAME", server).splitlines())
    patient = {"OTEL_EXPORTER_OTLP_TIMEOUT": "100"}
    environment = {**os.environ, **patient, **{name: value.strip('"') for name, value in named.items()}}
    program = lines("bridges.md", "python", "OTLPMetricExporter", server)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=150)
    series, asked = shell(lines("bridges.md", "", "my-trainer/series", server))
    assert series["series"][0]["max"] == [1.5]
    assert asked["rows"] == [["my.loss", 3, 7, 1.5], ["my.temperature", 3, 7, 71.5]]


def prometheus_config(server: Server) -> str:
    return lines("bridges.md", "yaml", "remote_write", server).replace("TOKEN", TOKEN)


def test_remote_write_as_the_protocol_has_it_goes_where_the_page_says(server: Server) -> None:
    config = prometheus_config(server)
    (url,), (credentials, *_) = re.findall(r"url: (\S+)", config), re.findall(r"credentials: ([^}]+)}", config)
    headers = {
        "Authorization": f"Bearer {credentials}",
        "Content-Encoding": "snappy",
        "Content-Type": "application/x-protobuf",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
    }
    body = write_request(({"__name__": "node_load1", "instance": "h1"}, [(0.5, 1_700_000_000_000)]))
    with urlopen(Request(url, body, headers), timeout=100) as reply:
        assert reply.status == 204
    with server.client() as client:
        asked = {"run": "cluster", "sql": "SELECT host, value FROM samples WHERE metric = 'node_load1'"}
        assert client.post("/api/v1/query", json=asked).json()["rows"] == [["h1", 0.5]]


@pytest.mark.skipif(not PROMETHEUS, reason="no Prometheus here: Debian has one in the package prometheus")
def test_a_real_prometheus_scrapes_and_writes_with_the_config_of_the_page(server: Server, tmp_path: Path) -> None:
    assert PROMETHEUS
    (tmp_path / "prometheus.yml").write_text("global: {scrape_interval: 1s}\n" + prometheus_config(server))
    command = [PROMETHEUS, "--web.listen-address=127.0.0.1:0", f"--storage.tsdb.path={tmp_path}/tsdb",
               f"--config.file={tmp_path}/prometheus.yml"]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        sql = "SELECT metric, count() FROM samples WHERE metric IN ('up', 'lens_server_healthy') AND value = 1 GROUP BY metric"
        end, rows = time.monotonic() + 90, []
        with server.client() as client:
            while len(rows) < 2 and time.monotonic() < end:
                time.sleep(0.5)
                assert child.poll() is None, (tmp_path / "log").read_text()[-2000:]
                rows = client.post("/api/v1/query", json={"run": "cluster", "sql": sql}).json().get("rows", [])
        assert sorted(metric for metric, _ in rows) == ["lens_server_healthy", "up"], (
            tmp_path / "log"
        ).read_text()[-2000:]
    finally:
        child.terminate()
        child.wait(30)
