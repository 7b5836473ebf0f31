"""The store: rows taken a second, bytes a row at rest, milliseconds a question, what a kill -9 costs; peers beside it.

Samples of many series (ranks × metrics) with a time of their own for each rank and step; half the metrics are noisy
gauges, half growing counters. Engines are compared in one process on the same Arrow rows; everything else goes through
a real server over HTTP.

    python benchmarks/store.py [--samples 100000000] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pyarrow as pa

from lens.store.decode import ARROW
from lens.store.engine import Store

RUN, START = "benchmark", 1_700_000_000_000_000_000
BATCH = 250_000
METRICS = 20
PEERS = ("duckdb", "trackio", "tensorboard", "wandb")


def columns(start: int, rows: int, ranks: int) -> dict[str, np.ndarray]:
    """Rows [start, start + rows): all metrics of all ranks at step 0, then step 1, and so on."""
    row = np.arange(start, start + rows)
    step, place = np.divmod(row, ranks * METRICS)
    rank, metric = np.divmod(place, METRICS)
    random = np.random.default_rng(start)
    # Each rank has its own moment in each step: one draw for all its metrics.
    jitter = (step * 1_000_003 + rank * 7919) * 2654435761 % 50_000_000
    gauge = np.round(random.normal(600, 8, rows), 3)
    counter = (step * 1000 + rank * 17).astype("<f8")
    return {
        "metric": metric.astype("<i4"), "rank": rank.astype("<i4"), "step": step.astype("<i8"),
        "t_ns": START + step * 1_000_000_000 + jitter, "value": np.where(metric % 2 == 0, gauge, counter),
    }  # fmt: skip


def engine_rows(start: int, rows: int, ranks: int) -> pa.Table:
    """As rows of the database's own table."""
    found = columns(start, rows, ranks)
    mid = found.pop("metric").astype("<u8") * np.uint64(0x9E3779B97F4A7C15)
    return pa.table({"run": np.full(rows, 1, "<u4"), "mid": mid, **found})


def body(start: int, rows: int, ranks: int) -> bytes:
    """As a request body: an Arrow IPC stream, zstd."""
    found = columns(start, rows, ranks)
    names = pa.array([f"metric.{index:02d}" for index in range(METRICS)])
    found["metric"] = pa.DictionaryArray.from_arrays(pa.array(found["metric"]), names)
    table = pa.table(found)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


class Server:
    """``lens serve`` over a folder."""

    def __init__(self, data: Path) -> None:
        began = time.perf_counter()
        command = [sys.executable, "-m", "lens", "serve", "--json", "--port", "0", "--data", str(data)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = json.loads(self.process.stdout.readline())["url"].partition("/?")[0]
        self.started_s = time.perf_counter() - began
        self.token = (data / "token").read_text().strip()

    def ask(
        self, path: str, content: bytes | None = None, content_type: str = "application/json", **headers: Any
    ) -> Any:
        """The reply to a request, asked again as long as the server says not now."""
        given = {"Authorization": f"Bearer {self.token}", "Content-Type": content_type, **headers}
        while True:
            try:
                with urlopen(Request(self.url + path, content, given), timeout=600) as reply:
                    is_json = reply.headers.get_content_type() == "application/json"
                    return json.load(reply) if is_json else reply.read()
            except HTTPError as error:
                if error.code not in (429, 503):
                    raise RuntimeError(error.read()) from error
                time.sleep(0.05)

    def sql(self, sql: str) -> list[list[Any]]:
        """Rows of a SELECT."""
        rows: list[list[Any]] = self.ask("/api/v1/query", json.dumps({"sql": sql, "run": RUN}).encode())["rows"]
        return rows

    def median_ms(self, path: str, content: bytes | None = None, times: int = 5) -> float:
        """How long an answer takes."""
        took = []
        for _ in range(times):
            began = time.perf_counter()
            self.ask(path, content)
            took.append(time.perf_counter() - began)
        return statistics.median(took) * 1000

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(60)


def engines(folder: Path, rows: int, ranks: int, found: dict[str, Any]) -> None:
    """Rows a second into each engine, from the same Arrow tables, in turns."""
    parts = [engine_rows(start, min(BATCH * 2, rows - start), ranks) for start in range(0, rows, BATCH * 2)]
    store = Store(f"chdb://{folder}/engine")
    duck = None
    if importlib.util.find_spec("duckdb"):
        import duckdb

        duck = duckdb.connect(str(folder / "duck.db"))
        duck.execute("SET threads = 2")
        duck.execute(
            "CREATE TABLE samples (run UINTEGER, mid UBIGINT, rank INT, step BIGINT, t_ns BIGINT, value DOUBLE)"
        )
    spent = {"lens": 0.0, "live": 0.0, "duckdb": 0.0}
    stop = threading.Event()
    asked = [0]

    def read() -> None:
        while not stop.is_set():
            store.query(
                "SELECT intDiv(step, 10) AS b, max(value) FROM lens.samples WHERE run = 1 AND mid = 0 GROUP BY b"
            )
            asked[0] += 1

    reader = threading.Thread(target=read)
    for part in parts:
        spent["lens"] += _timed(lambda part=part: store.insert("samples", part))
        if duck is not None:
            spent["duckdb"] += _timed(
                lambda part=part, duck=duck: duck.execute("INSERT INTO samples SELECT * FROM part")
            )
    reader.start()
    for part in parts:
        for target in ("samples", "rollup", "latest"):
            spent["live"] += _timed(lambda part=part, target=target: store.insert(target, part))
    stop.set()
    reader.join()
    store.close()
    found["ingest_rows_s"] = rows / spent["lens"]
    found["ingest_live_rows_s"] = rows / spent["live"]
    found["reads_while_ingesting"] = asked[0]
    found["ingest_rows_s_duckdb"] = rows / spent["duckdb"] if duck is not None else None
    few = parts[0].slice(0, min(rows, 200_000))
    found["ingest_rows_s_sqlite"] = few.num_rows / _timed(lambda: _into_sqlite(folder / "lite.db", few))


def _into_sqlite(path: Path, table: pa.Table) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE samples (run INT, mid TEXT, rank INT, step INT, t_ns INT, value REAL)")
    lists = [column.to_pylist() for column in table.columns]
    lists[1] = [str(mid) for mid in lists[1]]
    with connection:
        connection.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)", zip(*lists, strict=True))
    connection.close()


def _timed(job: Any) -> float:
    began = time.perf_counter()
    job()
    return time.perf_counter() - began


def over_http(folder: Path, rows: int, ranks: int, found: dict[str, Any]) -> None:
    """Ingest, size at rest and questions through a real server; then a kill in the middle of ingest."""
    data = folder / "data"
    server = Server(data)
    described = {"run": RUN, "world_size": ranks}
    server.ask("/api/v1/runs", json.dumps(described).encode())
    _send(server, _bodies(0, rows, ranks), found)
    started = time.perf_counter()
    stored = server.sql("SELECT count() FROM samples")[0][0]
    found["samples"] = stored
    found["settle_s"] = time.perf_counter() - started
    path = f"/api/v1/runs/{RUN}"
    found["series_ms"] = server.median_ms(f"{path}/series?metric=metric.00&rank=0&points=1000")
    found["heatmap_ms"] = server.median_ms(f"{path}/heatmap?metric=metric.00&columns=1000&format=binary")
    newest = "SELECT metric, rank, value FROM latest"
    found["now_ms"] = server.median_ms(
        "/api/v1/query", json.dumps({"sql": newest, "run": RUN, "limit": 100_000}).encode()
    )
    top = (
        "SELECT metric, rank, quantile(0.99)(value) AS p99 FROM samples GROUP BY metric, rank "
        "ORDER BY p99 DESC LIMIT 20"
    )
    found["p99_ms"] = server.median_ms("/api/v1/query", json.dumps({"sql": top, "run": RUN}).encode(), times=3)
    acknowledged = _kill_while_sending(server, rows, ranks)
    reopened = Server(data)
    found["server_start_s"] = reopened.started_s
    steps = sorted(acknowledged)
    low = rows // (ranks * METRICS)
    counts = {
        int(step): (int(total), int(distinct))
        for step, total, distinct in reopened.sql(
            f"SELECT step, count(), uniqExact(metric, rank) FROM samples WHERE step >= {low + 1} GROUP BY step LIMIT 100000"
        )
    }
    per_step = ranks * METRICS
    found["acknowledged"] = len(steps) * per_step
    found["acknowledged_lost"] = sum(per_step - counts.get(step, (0, 0))[1] for step in steps)
    found["doubled"] = sum(total - distinct for total, distinct in counts.values())
    reopened.stop()
    found["reopen_s"], found["bytes_per_sample"] = _reopened(data)


def _bodies(start: int, rows: int, ranks: int) -> Iterator[bytes]:
    for first in range(start, start + rows, BATCH):
        yield body(first, min(BATCH, start + rows - first), ranks)


def _send(server: Server, bodies: Iterator[bytes], found: dict[str, Any]) -> None:
    """All bodies, from two connections at a time; making them is not counted."""
    waiting: queue.Queue[tuple[int, bytes]] = queue.Queue()
    sent = [0]
    busy = 0.0

    def work() -> None:
        while True:
            try:
                number, content = waiting.get_nowait()
            except queue.Empty:
                return
            headers = {"Lens-Source": "benchmark", "Lens-Sequence": str(number)}
            reply = server.ask(f"/api/v1/runs/{RUN}/records", content, ARROW, **headers)
            sent[0] += reply["accepted"]

    number = 0
    while True:
        made = [each for each in (next(bodies, None) for _ in range(8)) if each is not None]
        if not made:
            break
        for each in made:
            waiting.put((number, each))
            number += 1
        threads = [threading.Thread(target=work) for _ in range(2)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        busy += time.perf_counter() - began
    found["ingest_http_rows_s"] = sent[0] / busy


def _kill_while_sending(server: Server, rows: int, ranks: int) -> set[int]:
    """Send one step a batch until the server is killed; the steps acknowledged."""
    acknowledged: set[int] = set()
    per_step = ranks * METRICS
    first = rows // per_step + 1
    threading.Timer(2.0, os.kill, (server.process.pid, signal.SIGKILL)).start()
    for step in range(first, first + 100_000):
        content = body(step * per_step, per_step, ranks)
        headers = {"Lens-Source": "killed", "Lens-Sequence": str(step)}
        try:
            server.ask(f"/api/v1/runs/{RUN}/records", content, ARROW, **headers)
        except (OSError, RuntimeError):
            break
        acknowledged.add(step)
    server.process.wait(60)
    return acknowledged


REOPEN = """
import json, sys, time
from pathlib import Path
import chdb
from lens.store.folder import DataFolder
began = time.perf_counter()
folder = DataFolder(Path(sys.argv[1]))
took = time.perf_counter() - began
for table in ("samples", "rollup", "latest"):
    folder.store.command(f"OPTIMIZE TABLE lens.{table} FINAL")
size = folder.store.scalar(
    "SELECT sum(bytes_on_disk) FROM system.parts "
    "WHERE active AND database = 'lens' AND table IN ('samples', 'rollup', 'latest')"
)
rows = folder.store.scalar("SELECT count() FROM lens.samples")
print(json.dumps([took, size / rows]))
folder.close()
"""


def _reopened(data: Path) -> tuple[float, float]:
    """Seconds until a folder is open, and bytes a sample once everything is merged (roll-up and latest included)."""
    done = subprocess.run([sys.executable, "-c", REOPEN, str(data)], capture_output=True, text=True, check=True)
    took, size = json.loads(done.stdout.strip().splitlines()[-1])
    return took, size


ROWS = (
    ("engine: rows a second, raw", "ingest_rows_s", "{:,.0f}"),
    ("  duckdb", "ingest_rows_s_duckdb", "{:,.0f}"),
    ("  sqlite (WAL)", "ingest_rows_s_sqlite", "{:,.0f}"),
    ("engine: with roll-up, latest and a reader", "ingest_live_rows_s", "{:,.0f}"),
    ("HTTP, Arrow, acknowledged: rows a second", "ingest_http_rows_s", "{:,.0f}"),
    ("bytes a sample at rest, roll-up and latest in", "bytes_per_sample", "{:.2f}"),
    ("one series → 1,000 points, ms", "series_ms", "{:.1f}"),
    ("map of all ranks × 1,000, ms", "heatmap_ms", "{:.1f}"),
    ("newest of every series, ms", "now_ms", "{:.1f}"),
    ("p99 of every series, top 20, ms", "p99_ms", "{:.1f}"),
    ("open again after kill -9, s", "reopen_s", "{:.2f}"),
    ("acknowledged rows lost", "acknowledged_lost", "{}"),
    ("rows doubled", "doubled", "{}"),
)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000_000, help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=512, help="(default: %(default)s); each has 20 metrics")
    parser.add_argument("--quick", action="store_true", help="1.5 million samples of 128 ranks, under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args()
    samples, ranks = (1_500_000, 128) if options.quick else (options.samples, options.ranks)
    found: dict[str, Any] = {"ranks": ranks, "series": ranks * METRICS}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engines(Path(folder), min(samples, 10_000_000), ranks, found)
        over_http(Path(folder), samples, ranks, found)
    found["peers_absent"] = [peer for peer in PEERS if importlib.util.find_spec(peer) is None]
    found["seconds"] = time.perf_counter() - began
    print(f"{found['samples']:,} samples of {found['series']:,} series\n")
    for label, key, form in ROWS:
        value = found[key]
        print(f"{label:<48} {'absent (not installed)' if value is None else form.format(value):>16}")
    print(
        f"\npeers not installed here: {', '.join(found['peers_absent']) or 'none'}; trackers are not compared yet"
    )
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
