"""A day of 1,024 ranks × 20 metrics × 0.1 Hz (1.8e8 samples) pushed through a real server in minutes, hour by hour.

1,016 ranks are sent as Arrow, 12 steps a request; eight more go the whole way of an agent, in a process of its own: ring,
spool on disk, shipper. After every hour of the day: memory of server and agent, disk beside what was predicted, and what
three questions take. Then 1,000 agents at once: small batches from 1,000 sources, every tenth sent twice.

    python benchmarks/day.py [--scale 1] [--agents 1000] [--out FILE] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.store_peers import METRICS
from benchmarks.store_server import RUN, Server, body
from lens.store.decode import ARROW
from lens.store.schema import OF_SAMPLES

HOURS, STEPS_AN_HOUR, EVERY_NS = 24, 360, 10_000_000_000
AGENT_RANKS = 8
STEPS_A_REQUEST = 12
BYTES_A_SAMPLE = 2.28
"""What docs/proofs/store.md says of samples at rest at 10⁸, times, roll-ups and newest values included."""
ROWS_A_BATCH = 100
"""What a small agent sends at once: 20 metrics of five steps."""


def as_agent(url: str, token: str, folder: Path, ranks: list[int]) -> None:
    """The collecting end of one host: for each number of steps on stdin, record, spool and ship them, then say so."""
    from lens.collectors.own_ring import OwnRing
    from lens.collectors.protocol import Reading
    from lens.collectors.registration import RunDescription
    from lens.collectors.shipper import Shipper, compress
    from lens.collectors.spool import RunSpool
    from lens.ring_reader import RingReader
    from lens.settings import Settings
    from lens.slots import encode_batch

    settings = Settings.load(
        {}, rings=folder / "rings", data=folder / "none", host="host0", server=url, token=token
    )
    ring, spool = OwnRing(settings, RUN), RunSpool(folder / "spool", RUN, "host0")
    reader = RingReader(ring.directory / "main.ring")
    shipper = Shipper(settings, lambda text: print(text, file=sys.stderr))
    shipper.add(spool, RunDescription(folder / "run.json", RUN))
    shipper.start()
    step, began = 0, time.monotonic_ns() - HOURS * STEPS_AN_HOUR * EVERY_NS
    for line in sys.stdin:
        for _ in range(int(line)):
            t_ns = began + step * EVERY_NS
            readings = [
                Reading(f"agent.{index:02d}", step + index * 0.1, t_ns, rank=rank)
                for rank in ranks
                for index in range(METRICS)
            ]
            ring.write(readings, {})
            step += 1
            parts = []
            while (part := reader.poll()) is not None:
                parts.append(part)
            content, encoding = compress(encode_batch("host0", spool.anchor, parts))
            spool.append(content, {}, len(readings), encoding)
            shipper.notify()
        while spool.waiting:
            time.sleep(0.01)
        print(json.dumps({"rejected": shipper.rejected, "spool": spool.size}), flush=True)
    shipper.stop(30)
    ring.close()


class Agent:
    """That process."""

    def __init__(self, server: Server, folder: Path, ranks: list[int]) -> None:
        command = [
            sys.executable,
            __file__,
            "--as-agent",
            server.url,
            server.token,
            str(folder),
            ",".join(map(str, ranks)),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, steps: int) -> None:
        """Begin with so many steps."""
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def wait(self) -> dict[str, int]:
        """What it says once the server has them."""
        assert self.process.stdout
        found: dict[str, int] = json.loads(self.process.stdout.readline())
        return found

    def stop(self) -> None:
        """End it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def day(folder: Path, scale: float, ranks: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, one an hour, and whether all samples are there."""
    server = Server(folder / "data")
    bulk = ranks - AGENT_RANKS
    server.ask("/api/v1/runs", json.dumps({"run": RUN, "world_size": ranks}).encode())
    agent = Agent(server, folder, list(range(bulk, ranks)))
    steps = max(STEPS_A_REQUEST, round(STEPS_AN_HOUR * scale))
    rows, done = [], 0
    for hour in range(1, HOURS + 1):
        began = time.perf_counter()
        agent.tell(steps)
        _send(server, (
            body(first * bulk * METRICS, min(STEPS_A_REQUEST, done + steps - first) * bulk * METRICS, bulk, EVERY_NS)
            for first in range(done, done + steps, STEPS_A_REQUEST)
        ))  # fmt: skip
        said = agent.wait()
        done += steps
        wanted = done * ranks * METRICS
        rows.append({"hour": hour, "samples": wanted, "spool_bytes": said["spool"], "rejected": said["rejected"],
                     **_state(server, agent, folder / "data", wanted), "seconds": time.perf_counter() - began})  # fmt: skip
        print(_row(rows[-1]), flush=True)
    stored = server.sql("SELECT count() FROM samples")[0][0]
    found = {"wanted": done * ranks * METRICS, "stored": stored}
    agent.stop()
    server.stop()
    return rows, found


def _send(server: Server, bodies: Iterator[bytes]) -> None:
    """All bodies, two at a time."""
    waiting: queue.Queue[bytes | None] = queue.Queue(2)

    def work() -> None:
        while (content := waiting.get()) is not None:
            server.ask(f"/api/v1/runs/{RUN}/records", content, ARROW)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for content in bodies:
        waiting.put(content)
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()


def _state(server: Server, agent: Agent, data: Path, samples: int) -> dict[str, Any]:
    info = server.ask("/api/v1/store")
    tables = {each["table"]: each["bytes"] for each in info["tables"]}
    path = f"/api/v1/runs/{RUN}"
    return {
        "server_mb": _memory(server.process.pid), "agent_mb": _memory(agent.process.pid),
        "active_mb": sum(tables[name] for name in OF_SAMPLES) / 1e6,
        "predicted_mb": samples * BYTES_A_SAMPLE / 1e6,
        "folder_mb": sum(_size(each) for each in data.rglob("*")) / 1e6,
        "series_ms": server.median_ms(f"{path}/series?metric=metric.00&rank=0&points=1000", times=3),
        "heatmap_ms": server.median_ms(f"{path}/heatmap?metric=metric.00&columns=1000&format=binary", times=3),
        "now_ms": server.median_ms(f"{path}/latest?metric=metric.00", times=3),
    }  # fmt: skip


def _memory(pid: int) -> float:
    """Resident MB of a process and its children."""
    whole = psutil.Process(pid)
    return sum(each.memory_info().rss for each in (whole, *whole.children(recursive=True))) / 1e6


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except OSError:
        return 0  # merged away in this moment


def fan_in(folder: Path, agents: int, batches: int) -> dict[str, Any]:
    """Many agents at once, every tenth batch sent twice; what was acknowledged and what is stored."""
    server = Server(folder / "many")
    server.ask("/api/v1/runs", json.dumps({"run": RUN, "world_size": agents}).encode())
    before = _memory(server.process.pid)
    jobs: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for number in range(batches):
        for source in range(agents):
            jobs.put((source, number))
    took: list[float] = []
    doubled = [0]

    def work() -> None:
        while True:
            try:
                source, number = jobs.get_nowait()
            except queue.Empty:
                return
            content = body((number * agents + source) * ROWS_A_BATCH, ROWS_A_BATCH, agents, EVERY_NS)
            headers = {"Lens-Source": f"agent:host{source}:0", "Lens-Sequence": str(number)}
            began = time.perf_counter()
            server.ask(f"/api/v1/runs/{RUN}/records", content, ARROW, **headers)
            took.append(time.perf_counter() - began)
            if (source + number) % 10 == 0:
                server.ask(f"/api/v1/runs/{RUN}/records", content, ARROW, **headers)
                doubled[0] += 1

    threads = [threading.Thread(target=work) for _ in range(24)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - began
    stored = server.sql("SELECT count() FROM samples")[0][0]
    found = {
        "agents": agents, "batches": agents * batches, "sent_twice": doubled[0], "wanted": agents * batches * ROWS_A_BATCH,
        "stored": stored, "batches_s": (agents * batches + doubled[0]) / spent, "p50_ms": statistics.median(took) * 1000,
        "p99_ms": sorted(took)[len(took) * 99 // 100] * 1000, "server_mb_before": before,
        "server_mb_after": _memory(server.process.pid),
    }  # fmt: skip
    server.stop()
    return found


COLUMNS = (("hour", "{}"), ("samples", "{:,}"), ("seconds", "{:.0f}"), ("server_mb", "{:.0f}"), ("agent_mb", "{:.0f}"),
           ("spool_bytes", "{}"), ("active_mb", "{:.0f}"), ("predicted_mb", "{:.0f}"), ("folder_mb", "{:.0f}"),
           ("series_ms", "{:.0f}"), ("heatmap_ms", "{:.0f}"), ("now_ms", "{:.0f}"))  # fmt: skip
HEAD = (
    "| hour | samples | took, s | server, MB | agent, MB | its spool, bytes | on disk, MB | predicted, MB | "
    f"whole folder, MB | series, ms | map, ms | newest, ms |\n{'|---' * len(COLUMNS)}|"
)


def _row(found: dict[str, Any]) -> str:
    return f"| {' | '.join(form.format(found[name]) for name, form in COLUMNS)} |"


def page(rows: list[dict[str, Any]], whole: dict[str, Any], many: dict[str, Any]) -> str:
    """What was measured, for people."""
    return "\n".join([
        HEAD, *map(_row, rows), "",
        f"Samples sent {whole['wanted']:,}, stored {whole['stored']:,}.", "",
        f"{many['agents']:,} agents at once, {many['batches']:,} batches of {ROWS_A_BATCH} samples, {many['sent_twice']:,} of them "
        f"sent twice: sent {many['wanted']:,}, stored {many['stored']:,}; {many['batches_s']:,.0f} batches a second, "
        f"acknowledged in {many['p50_ms']:.0f} ms (median) and {many['p99_ms']:.0f} ms (99 of 100); "
        f"server {many['server_mb_before']:.0f} MB before, {many['server_mb_after']:.0f} MB after.",
    ])  # fmt: skip


def main() -> int:
    """Measure and print; exit 1 if a sample is missing or doubled."""
    if sys.argv[1:2] == ["--as-agent"]:
        url, token, folder, ranks = sys.argv[2:6]
        as_agent(url, token, Path(folder), [int(rank) for rank in ranks.split(",")])
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="part of each hour (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--agents", type=int, default=1000, help="that send at once (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=20, help="of each of them (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--out", type=Path, help="write the page there too")
    options = parser.parse_args()
    began, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="lens-day-") as name:
        rows, whole = day(Path(name), options.scale, options.ranks)
        many = fan_in(Path(name), options.agents, options.batches)
    minutes = (time.perf_counter() - began) / 60
    said = page(rows, whole, many)
    print(said)
    if options.out:
        command = (
            f"python benchmarks/day.py --scale {options.scale:g} --ranks {options.ranks} --agents {options.agents}"
        )
        about = (
            f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, load {load:.1f} before, {minutes:.0f} minutes"
        )
        note = (
            "A row an hour of the day, after it was pushed through. *On disk* are samples, times, roll-ups and newest values; the whole\n"
            "folder also holds the log and what was merged away in the last eight minutes."
        )
        options.out.write_text(f"# A day of {options.ranks:,} ranks\n\n`{command}`, {about}.\n{note}\n\n{said}\n")
    if options.json:
        print(json.dumps({"hours": rows, **whole, "fan_in": many, "minutes": minutes}))
    return 0 if whole["wanted"] == whole["stored"] and many["wanted"] == many["stored"] else 1


if __name__ == "__main__":
    sys.exit(main())
