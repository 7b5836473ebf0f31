"""A real server for the store's benchmark, and what is sent to it: Arrow, slots of a ring, a tracker's scalars."""

from __future__ import annotations

import dataclasses
import itertools
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pyarrow as pa

from benchmarks.store_peers import METRICS, START, WIDTH, columns, scalars
from lens.reading.connection import Connection
from lens.store.decode import ARROW

RUN = "benchmark"
SLOTS = "application/vnd.lens.slots"


def body(start: int, rows: int, ranks: int, every_ns: int = 1_000_000_000) -> bytes:
    """As a request body: an Arrow IPC stream, zstd."""
    found = columns(start, rows, ranks, every_ns)
    names = pa.array([f"metric.{index:02d}" for index in range(METRICS)])
    found["metric"] = pa.DictionaryArray.from_arrays(pa.array(found["metric"]), names)
    table = pa.table(found)
    return _stream(table)


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


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


def slots(folder: Path, rows: int, found: dict[str, Any]) -> None:
    """Samples a second as an agent sends them: slots of a ring, 20 values a row, acknowledged."""
    from lens.collectors.own_ring import OwnRing
    from lens.collectors.protocol import Reading
    from lens.collectors.shipper import compress
    from lens.collectors.spool import take_anchor
    from lens.ring_reader import RingReader
    from lens.settings import Settings
    from lens.slots import encode_batch

    settings = Settings.load({}, rings=folder / "rings", data=folder / "ring-data", host="host0")
    ring, bodies, anchor = OwnRing(dataclasses.replace(settings, ring_mib=2), RUN), [], take_anchor()
    reader = RingReader(ring.directory / "main.ring")
    for row in range(rows // METRICS):
        t_ns = time.monotonic_ns()
        ring.write([Reading(f"metric.{index:02d}", row * 0.5 + index, t_ns) for index in range(METRICS)], {})
        if row % 1500 == 1499:
            bodies.append(_slot_body(reader, anchor, compress, encode_batch))
    bodies.append(_slot_body(reader, anchor, compress, encode_batch))
    ring.close()
    server = Server(folder / "slots")
    server.ask("/api/v1/runs", json.dumps({"run": RUN}).encode())
    began, taken = time.perf_counter(), 0
    for number, (content, encoding) in enumerate(bodies):
        headers = {"Lens-Source": "slots", "Lens-Sequence": str(number), "Content-Encoding": encoding}
        taken += server.ask(f"/api/v1/runs/{RUN}/records", content, SLOTS, **headers)["accepted"]
    found["ingest_slots_rows_s"] = server.sql("SELECT count() FROM samples")[0][0] / (time.perf_counter() - began)
    server.stop()


def _slot_body(reader: Any, anchor: Any, compress: Any, encode: Any) -> tuple[bytes, str]:
    parts = []
    while (part := reader.poll()) is not None:
        parts.append(part)
    packed: tuple[bytes, str] = compress(encode("host0", anchor, parts))
    return packed


def as_tracker(folder: Path, points: int) -> dict[str, Any]:
    """The same as the trackers do: 100 scalars a step, on disk; then one series and all of them, every point."""
    from lens.reading import StoredRun, _Server

    server, names = Server(folder / "tracker"), list(scalars(0))
    # The first table loads pandas: before the clock starts, as the trackers are loaded before theirs does.
    pa.table({"loads": np.zeros(1)})
    server.ask("/api/v1/runs", json.dumps({"run": RUN, "world_size": 1}).encode())
    waiting: queue.Queue[pa.Table | None] = queue.Queue(2)

    def send() -> None:
        while (table := waiting.get()) is not None:
            server.ask(f"/api/v1/runs/{RUN}/records", _stream(table), ARROW)

    # As the trackers do, from a thread of its own.
    sender = threading.Thread(target=send)
    sender.start()
    steps, began, texts = points // WIDTH, time.perf_counter(), pa.array(names)
    for first in range(0, steps, 1000):
        some = range(first, min(first + 1000, steps))
        values = itertools.chain.from_iterable(scalars(step).values() for step in some)
        step = np.repeat(np.arange(some.start, some.stop), WIDTH)
        waiting.put(pa.table({
            "metric": pa.DictionaryArray.from_arrays(np.tile(np.arange(WIDTH, dtype="<i4"), len(some)), texts),
            "rank": np.zeros(len(step), "<i4"), "step": step, "t_ns": START + step * 10**9,
            "value": np.fromiter(values, "<f8", len(step)),
        }))  # fmt: skip
    waiting.put(None)
    sender.join()
    took = time.perf_counter() - began
    stored = StoredRun(_Server(Connection(server.url, server.token)), RUN)

    def read(asks: list[Callable[[], Any]], wanted: int) -> float:
        times = []
        for ask in asks:
            began = time.perf_counter()
            assert ask().num_rows == wanted
            times.append((time.perf_counter() - began) * 1000)
        return statistics.median(times)

    def one(name: str) -> Callable[[], Any]:
        return lambda: stored.series(name).arrow()

    def every() -> Any:
        return stored.table("samples").arrow()

    # Each question for the first time, then the same again: a run that has not changed is answered from memory.
    found = {"one_ms": read([one(name) for name in names[:5]], steps), "all_ms": read([every], steps * WIDTH)}
    again = {"one_again_ms": read([one(names[0])] * 5, steps), "all_again_ms": read([every] * 3, steps * WIDTH)}
    server.stop()
    return {"points": steps * WIDTH, "rows_s": steps * WIDTH / took, **found, **again}
