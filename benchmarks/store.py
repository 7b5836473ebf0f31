"""The store: rows taken a second, bytes a row at rest, milliseconds a question, what a kill -9 costs; peers beside it.

Samples of many series (ranks × metrics) with a time of their own for each rank and step; half the metrics are noisy
gauges, half growing counters. The engine takes the same Arrow rows as duckdb and sqlite; everything else goes through a
real server over HTTP. Trackers are compared at 100 scalars a step. Peers that another environment has are found with
--peers:

    python -m venv PEERS && PEERS/bin/pip install duckdb trackio tensorboard wandb numpy "setuptools<81"
    python benchmarks/store.py [--samples 100000000] [--peers PEERS/bin/python] [--quick] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.store_peers import BATCH, DATABASES, METRICS, TRACKERS, columns, measure
from benchmarks.store_server import RUN, Server, as_tracker, body, slots
from lens.store.aggregates import SERIES, aggregated
from lens.store.decode import ARROW
from lens.store.engine import Store
from lens.store.moments import Moments

QUICK = 30_000
"""Most rows of a slow peer with --quick."""
SPARE_STEPS = 10_000
"""Steps set aside for what is sent while a question is asked."""


def engine_rows(start: int, rows: int, ranks: int) -> pa.Table:
    """As rows of the database's own table."""
    found = columns(start, rows, ranks)
    metric = found.pop("metric")
    mid = metric.astype("<u8") * np.uint64(0x9E3779B97F4A7C15)
    return pa.table({"run": np.full(rows, 1, "<u4"), "mid": mid, SERIES: metric, **found})


def engine(folder: Path, rows: int, ranks: int, found: dict[str, Any]) -> None:
    """Rows a second into the engine: raw, then with roll-up, newest values and a reader."""
    parts = [engine_rows(start, min(BATCH * 2, rows - start), ranks) for start in range(0, rows, BATCH * 2)]
    store = Store(f"chdb://{folder}/engine")
    stop, asked = threading.Event(), [0]

    def read() -> None:
        while not stop.is_set():
            store.query(
                "SELECT intDiv(step, 10) AS b, max(value) FROM lens.samples WHERE run = 1 AND mid = 0 GROUP BY b"
            )
            asked[0] += 1

    found["ingest_rows_s"] = rows / sum(_timed(lambda part=part: store.insert("samples", part)) for part in parts)
    reader = threading.Thread(target=read)
    reader.start()
    moments = Moments(store)
    spent = sum(_timed(lambda part=part: _insert_all(store, moments, part)) for part in parts)
    stop.set()
    reader.join()
    store.close()
    found["ingest_live_rows_s"] = rows / spent
    found["reads_while_ingesting"] = asked[0]


def _insert_all(store: Store, moments: Moments, part: pa.Table) -> None:
    made = aggregated(part)
    for target, rows in {**made, **moments.split(made["samples"])}.items():
        store.insert(target, rows)


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
    busy = _send(server, _bodies(0, rows, ranks), found)
    started = time.perf_counter()
    # The tables' own count: ten seconds, what one question may take, are too few to join a thousand million rows.
    found["samples"] = server.ask("/api/v1/store")["samples"]
    found["ingest_http_readable_rows_s"] = rows / (busy + time.perf_counter() - started)
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
    try:
        found["p99_ms"] = server.median_ms("/api/v1/query", json.dumps({"sql": top, "run": RUN}).encode(), times=3)
    except RuntimeError as error:  # over what one question may take, such as ten seconds
        found["p99_ms"], found["p99_refused"] = None, json.loads(error.args[0])["error"].partition(":")[0]
    found["heatmap_ingesting_ms"] = _while_sending(
        server, rows, ranks, lambda: server.median_ms(f"{path}/heatmap?metric=metric.00&columns=1000&format=binary")
    )
    acknowledged = _kill_while_sending(server, rows, ranks)
    reopened = Server(data)
    found["server_start_s"] = reopened.started_s
    reopened.stop()
    low, per_step = rows // (ranks * METRICS) + SPARE_STEPS, ranks * METRICS
    found["reopen_s"], found["bytes_per_sample"], kept = _reopened(data, low)
    counts = {step: (total, distinct) for step, total, distinct in kept}
    found["acknowledged"] = len(acknowledged) * per_step
    found["acknowledged_lost"] = sum(per_step - counts.get(step, (0, 0))[1] for step in acknowledged)
    found["doubled"] = sum(total - distinct for total, distinct in counts.values())


def _bodies(start: int, rows: int, ranks: int) -> Iterator[bytes]:
    for first in range(start, start + rows, BATCH):
        yield body(first, min(BATCH, start + rows - first), ranks)


def _send(server: Server, bodies: Iterator[bytes], found: dict[str, Any]) -> float:
    """All bodies, from two connections at a time; making them is not counted. Returns the seconds counted."""
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
    return busy


def _while_sending(server: Server, rows: int, ranks: int, ask: Callable[[], float]) -> float:
    """What a question takes while batches come in as fast as they are taken."""
    stop, per_step = threading.Event(), ranks * METRICS

    def send() -> None:
        for step in range(rows // per_step + 1, rows // per_step + SPARE_STEPS):
            if stop.is_set():
                return
            server.ask(f"/api/v1/runs/{RUN}/records", body(step * per_step, per_step, ranks), ARROW)

    sender = threading.Thread(target=send)
    sender.start()
    time.sleep(0.5)
    took = ask()
    stop.set()
    sender.join()
    return took


def _kill_while_sending(server: Server, rows: int, ranks: int) -> set[int]:
    """Send one step a batch until the server is killed; the steps acknowledged."""
    acknowledged: set[int] = set()
    per_step = ranks * METRICS
    first = rows // per_step + SPARE_STEPS + 1
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
from lens.store.schema import OF_SAMPLES
began = time.perf_counter()
folder = DataFolder(Path(sys.argv[1]))
took = time.perf_counter() - began
folder.settle()
kept = folder.store.query(
    f"SELECT step, toInt64(count()) AS n, toInt64(uniqExact(mid, rank)) AS d FROM lens.samples WHERE step > {sys.argv[2]} GROUP BY step"
)
for table in OF_SAMPLES:
    folder.store.command(f"OPTIMIZE TABLE lens.{table} FINAL")
size = folder.store.scalar(
    "SELECT sum(bytes_on_disk) FROM system.parts "
    f"WHERE active AND database = 'lens' AND table IN {OF_SAMPLES}"
)
rows = folder.store.scalar("SELECT count() FROM lens.samples")
print(json.dumps([took, size / rows, [list(row.values()) for row in kept.to_pylist()]]))
folder.close()
"""


def _reopened(data: Path, low: int) -> tuple[float, float, list[list[int]]]:
    """Seconds until a folder is open, bytes a sample once everything is merged (roll-up and latest included), and rows
    and distinct series of every step after `low`."""
    command = [sys.executable, "-c", REOPEN, str(data), str(low)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    took, size, kept = json.loads(done.stdout.strip().splitlines()[-1])
    return took, size, kept


ROWS = (
    ("engine: rows a second, raw", "ingest_rows_s", "{:,.0f}"),
    ("engine: with roll-up, latest and a reader", "ingest_live_rows_s", "{:,.0f}"),
    ("HTTP, Arrow, acknowledged: rows a second", "ingest_http_rows_s", "{:,.0f}"),
    ("  until all of them can be read", "ingest_http_readable_rows_s", "{:,.0f}"),
    ("HTTP, slots of a ring, until readable: rows a second", "ingest_slots_rows_s", "{:,.0f}"),
    ("bytes a sample at rest, times, roll-ups and latest in", "bytes_per_sample", "{:.2f}"),
    ("one series → 1,000 points, ms", "series_ms", "{:.1f}"),
    ("map of all ranks × 1,000, ms", "heatmap_ms", "{:.1f}"),
    ("  while records come in, ms", "heatmap_ingesting_ms", "{:.1f}"),
    ("newest of every series, ms", "now_ms", "{:.1f}"),
    ("p99 of every series, top 20, ms", "p99_ms", "{:.1f}"),
    ("open again after kill -9, s", "reopen_s", "{:.2f}"),
    ("acknowledged rows", "acknowledged", "{:,}"),
    ("  lost", "acknowledged_lost", "{}"),
    ("  doubled", "doubled", "{}"),
)
_DATABASE = (("rows a second", "rows_s", "{:,.0f}"), ("bytes a row", "bytes_per_point", "{:.2f}"),
             ("series, ms", "series_ms", "{:.1f}"), ("map, ms", "heatmap_ms", "{:.1f}"),
             ("newest, ms", "now_ms", "{:.1f}"), ("p99, ms", "p99_ms", "{:.1f}"))  # fmt: skip
_TRACKER = (("points a second", "rows_s", "{:,.0f}"), ("bytes a point", "bytes_per_point", "{:.1f}"),
            ("one series, ms", "one_ms", "{:.1f}"), ("all 100, ms", "all_ms", "{:.1f}"),
            ("one again, ms", "one_again_ms", "{:.1f}"), ("all again, ms", "all_again_ms", "{:.1f}"))  # fmt: skip


def tables(found: dict[str, Any]) -> str:
    """What was measured, for people."""
    own = [
        f"| {label} | {found[f'{key[:-3]}_refused'] if found[key] is None else form.format(found[key])} |"
        for label, key, form in ROWS
    ]
    raw = {"points": found["engine_rows"], "rows_s": found["ingest_rows_s"], "bytes_per_point": found["bytes_per_sample"],
           **{key: found[key] for key in ("series_ms", "heatmap_ms", "now_ms", "p99_ms")}}  # fmt: skip
    return "\n".join([
        f"| {found['samples']:,} samples of {found['series']:,} series | |", "|---|---|", *own, "",
        "Databases, the same rows, on disk when counted. lens answers over HTTP, at all its samples; the others in their process,",
        "at as many rows as the table says.", "",
        *_beside({"lens": raw, **found["databases"]}, "rows", _DATABASE), "",
        "Trackers, 100 scalars a step, from the first call until all is on disk; read by each one's own reader. lens takes Arrow",
        "over HTTP, 1,000 steps a request, and is read by `lens.open`: each question for the first time, then *again*, when the",
        "server still has the answer.", "",
        *_beside(found["trackers"], "points", _TRACKER),
    ])  # fmt: skip


def _beside(measured: dict[str, dict[str, Any]], unit: str, cells: Any) -> list[str]:
    lines = [f"| | {unit} | {' | '.join(label for label, _, _ in cells)} |", "|---" * (len(cells) + 2) + "|"]
    for name, each in measured.items():
        why = each.get("absent")
        values = [form.format(each[key]) if each.get(key) is not None else "–" for _, key, form in cells]
        lines.append(f"| {name} | {each['points']:,} | {f'absent: {why}' if why else ' | '.join(values)} |")
    return lines


def _whole(text: str) -> int:
    return int(float(text))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=_whole, default=20_000_000, help="as 1e9 too (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=512, help="(default: %(default)s); each has 20 metrics")
    parser.add_argument("--points", type=_whole, default=1_000_000, help="of the trackers (default: %(default)s)")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="that of the peers' environment")
    parser.add_argument("--quick", action="store_true", help="1.5 million samples of 128 ranks, 100,000 points")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--out", type=Path, help="write the page there too")
    options = parser.parse_args()
    samples, ranks, points = options.samples, options.ranks, options.points
    if options.quick:
        samples, ranks, points = 1_500_000, 128, 100_000
    found: dict[str, Any] = {"ranks": ranks, "series": ranks * METRICS, "engine_rows": min(samples, 10_000_000)}
    began, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine(folder, found["engine_rows"], ranks, found)
        found["databases"] = measure(
            options.peers, DATABASES, folder, samples, ranks, QUICK if options.quick else None
        )
        over_http(folder, samples, ranks, found)
        slots(folder, min(samples, 2_000_000), found)
        found["trackers"] = {
            "lens": as_tracker(folder, points),
            **measure(options.peers, TRACKERS, folder, points, ranks, QUICK if options.quick else None),
        }
    found["ingest_rows_s_duckdb"] = found["databases"]["duckdb"].get("rows_s")
    found["seconds"] = time.perf_counter() - began
    print(tables(found))
    if options.out:
        command = f"python benchmarks/store.py --samples {samples} --ranks {ranks} --points {points} --peers PEERS/bin/python"
        about = f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {load:.1f} before, {found['seconds'] / 60:.0f} minutes"
        options.out.write_text(f"# The store, peers beside it\n\n`{command}`, {about}.\n\n{tables(found)}\n")
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
