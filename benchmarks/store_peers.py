"""Peers of the store, each in a process of its own and in the environment where it is installed; needs numpy alone.

Databases (duckdb, sqlite) take the rows of `store.columns`; trackers (trackio, TensorBoard, wandb offline) take as many
points as 100 scalars a step. Each writes through its own interface, then is closed and synced to disk; a new process
reads through the peer's own reader.

    PYTHON benchmarks/store_peers.py write|read PEER FOLDER POINTS RANKS     # one JSON object
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 100
"""Scalars a tracker logs in one step."""
METRICS, BATCH = 20, 250_000
START = 1_700_000_000_000_000_000
COLUMNS = "metric INT, rank INT, step BIGINT, t_ns BIGINT, value DOUBLE"
QUESTIONS = {
    "series_ms": "SELECT step // {bucket} AS b, min(value), max(value), avg(value) FROM samples "
    "WHERE metric = 0 AND rank = 0 GROUP BY b",
    "heatmap_ms": "SELECT rank, step // {bucket} AS b, max(value) FROM samples WHERE metric = 0 GROUP BY rank, b",
    "now_ms": "SELECT metric, rank, max(step), {newest} FROM samples GROUP BY metric, rank",
    "p99_ms": "SELECT metric, rank, quantile_cont(value, 0.99) AS p FROM samples GROUP BY metric, rank "
    "ORDER BY p DESC LIMIT 20",
}


def columns(start: int, rows: int, ranks: int, every_ns: int = 1_000_000_000) -> dict[str, np.ndarray]:
    """Rows [start, start + rows): all metrics of all ranks at step 0, then step 1, and so on, `every_ns` apart."""
    row = np.arange(start, start + rows)
    step, place = np.divmod(row, ranks * METRICS)
    rank, metric = np.divmod(place, METRICS)
    random = np.random.default_rng(start)
    # Each rank has its own moment in each step, one for all its metrics and independent of every other.
    jitter = _scattered(step * ranks + rank) % 50_000_000
    gauge = np.round(random.normal(600, 8, rows), 3)
    counter = (step * 1000 + rank * 17).astype("<f8")
    return {
        "metric": metric.astype("<i4"), "rank": rank.astype("<i4"), "step": step.astype("<i8"),
        "t_ns": START + step * every_ns + jitter, "value": np.where(metric % 2 == 0, gauge, counter),
    }  # fmt: skip


def _scattered(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers without any order that a codec could find (splitmix64)."""
    mixed = (numbers.astype("<u8") + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1)).astype("<i8")


def scalars(step: int) -> dict[str, float]:
    """What a tracker logs at a step."""
    return {f"train/metric_{index:03d}": step * 0.001 + index for index in range(WIDTH)}


def median_ms(ask: Callable[[], Any], times: int = 3) -> float:
    """How long an answer takes, ms."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        ask()
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


class Duckdb:
    """Rows by the batch from arrays, a transaction a batch; all its threads."""

    module, most, slow = "duckdb", 10**10, False

    def write(self, folder: Path, rows: int, ranks: int) -> float:
        import duckdb

        connection, spent = duckdb.connect(str(folder / "duck.db")), 0.0
        connection.execute(f"CREATE TABLE samples ({COLUMNS})")
        for start in range(0, rows, BATCH):
            part = columns(start, min(BATCH, rows - start), ranks)
            began = time.perf_counter()
            connection.execute("INSERT INTO samples SELECT * FROM part")
            spent += time.perf_counter() - began
            del part
        began = time.perf_counter()
        connection.close()
        return spent + time.perf_counter() - began

    def read(self, folder: Path, rows: int, ranks: int) -> dict[str, float | None]:
        import duckdb

        spare = {"temp_directory": str(folder / "spare"), "memory_limit": "12GB"}
        connection = duckdb.connect(str(folder / "duck.db"), read_only=True, config=spare)
        words = {"bucket": max(1, rows // (ranks * METRICS) // 1000), "newest": "arg_max(value, step)"}
        found: dict[str, float | None] = {}
        for key, sql in QUESTIONS.items():
            try:
                found[key] = median_ms(lambda sql=sql: connection.execute(sql.format(**words)).fetchnumpy())
            except duckdb.Error as error:
                print(f"{key}: {error}", file=sys.stderr)
                found[key] = None
        return found


class Sqlite:
    """Rows by the batch, WAL, with the index that one series needs."""

    module, most, slow = "sqlite3", 2_000_000, True

    def write(self, folder: Path, rows: int, ranks: int) -> float:
        import sqlite3

        connection, spent = sqlite3.connect(folder / "lite.db"), 0.0
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"CREATE TABLE samples ({COLUMNS})")
        connection.execute("CREATE INDEX by_series ON samples (metric, rank, step)")
        for start in range(0, rows, BATCH):
            lists = [each.tolist() for each in columns(start, min(BATCH, rows - start), ranks).values()]
            began = time.perf_counter()
            with connection:
                connection.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", zip(*lists, strict=True))
            spent += time.perf_counter() - began
        began = time.perf_counter()
        connection.close()
        return spent + time.perf_counter() - began

    def read(self, folder: Path, rows: int, ranks: int) -> dict[str, float | None]:
        import sqlite3

        connection = sqlite3.connect(folder / "lite.db")
        words = {"bucket": max(1, rows // (ranks * METRICS) // 1000), "newest": "value"}
        found: dict[str, float | None] = {"p99_ms": None}  # it has no quantiles
        for key in ("series_ms", "heatmap_ms", "now_ms"):
            sql = QUESTIONS[key].replace("//", "/").format(**words)
            found[key] = median_ms(lambda sql=sql: connection.execute(sql).fetchall())
        return found


class Trackio:
    """Its local SQLite store; no Space, no dashboard."""

    module, most, slow = "trackio", 1_000_000, False

    def _opened(self, folder: Path) -> Any:
        os.environ |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
        import trackio

        return trackio

    def write(self, folder: Path, rows: int, ranks: int) -> float:
        tracker = self._opened(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            tracker.init(project="bench", name="run", embed=False, auto_log_gpu=False, auto_log_cpu=False)
            began = time.perf_counter()
            for step in range(rows // WIDTH):
                tracker.log(scalars(step), step=step)
            tracker.finish()
        return time.perf_counter() - began

    def read(self, folder: Path, rows: int, ranks: int) -> dict[str, float | None]:
        self._opened(folder)
        from trackio.sqlite_storage import SQLiteStorage

        name = next(iter(scalars(0)))
        one, found = SQLiteStorage.get_metric_values("bench", "run", name), SQLiteStorage.get_logs("bench", "run")
        _must(len(one) == len(found) == rows // WIDTH)
        return {
            "one_ms": median_ms(lambda: SQLiteStorage.get_metric_values("bench", "run", name)),
            "all_ms": median_ms(lambda: SQLiteStorage.get_logs("bench", "run")),
        }


class Tensorboard:
    """Its own writer of event files, read by its EventAccumulator."""

    module, most, slow = "tensorboard", 1_000_000, True

    def write(self, folder: Path, rows: int, ranks: int) -> float:
        from tensorboard.summary import Writer

        writer = Writer(str(folder))
        began = time.perf_counter()
        for step in range(rows // WIDTH):
            for name, value in scalars(step).items():
                writer.add_scalar(name, value, step)
        writer.close()
        return time.perf_counter() - began

    def read(self, folder: Path, rows: int, ranks: int) -> dict[str, float | None]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        def load(every: bool) -> int:
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
            events.Reload()
            names = [*events.Tags()["scalars"], *events.Tags()["tensors"]]
            read = events.Scalars if events.Tags()["scalars"] else events.Tensors
            return sum(len(read(name)) for name in (names if every else names[:1]))

        _must(load(True) == rows // WIDTH * WIDTH)
        # A file holds all series: reading one reads them all.
        return {"one_ms": median_ms(lambda: load(False), 1), "all_ms": median_ms(lambda: load(True), 1)}


class Wandb:
    """Offline, system statistics off; read by its own `wandb leet inspect`, where its version has it."""

    module, most, slow = "wandb", 1_000_000, True

    def write(self, folder: Path, rows: int, ranks: int) -> float:
        os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        import wandb

        settings = wandb.Settings(x_disable_stats=True, x_disable_meta=True, console="off")
        run = wandb.init(project="bench", mode="offline", dir=str(folder), settings=settings)
        began = time.perf_counter()
        for step in range(rows // WIDTH):
            run.log(scalars(step), step=step)
        run.finish()
        return time.perf_counter() - began

    def read(self, folder: Path, rows: int, ranks: int) -> dict[str, float | None]:
        path = next(folder.glob("wandb/offline-run-*/run-*.wandb"))
        tool = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(path)]

        def load() -> int:
            with subprocess.Popen(tool, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
                assert child.stdout is not None
                lines = (line for line in child.stdout if b'"type":"history"' in line)
                return sum(len(json.loads(line)["history"]["item"]) > WIDTH - 1 for line in lines)

        _must(load() == rows // WIDTH)
        took = median_ms(load, 1)
        return {"one_ms": took, "all_ms": took}


def _must(holds: bool) -> None:
    if not holds:
        raise SystemExit("the peer has not stored what it was given")


PEERS: dict[str, Any] = {
    "duckdb": Duckdb,
    "sqlite": Sqlite,
    "trackio": Trackio,
    "tensorboard": Tensorboard,
    "wandb": Wandb,
}
DATABASES, TRACKERS = ("duckdb", "sqlite"), ("trackio", "tensorboard", "wandb")


def _synced_bytes(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return sum(path.stat().st_blocks * 512 for path in files)


def measure(
    python: str, names: Iterable[str], folder: Path, points: int, ranks: int, most: int | None = None
) -> dict[str, dict[str, Any]]:
    """What each peer does with so many points: {points, rows_s, bytes_per_point, …} or {absent: why}.

    `most` bounds the points of those that are slow.
    """
    found = {}
    # Not resolved: an environment's python is a link, and is known by where the link lies.
    python = str(Path(python).absolute())
    for name in names:
        bound = most if most and PEERS[name].slow else points
        count, place = min(points, PEERS[name].most, bound), folder / name
        place.mkdir()
        found[name] = {"points": count}
        for verb in ("write", "read"):
            command = [python, str(Path(__file__).resolve()), verb, name, str(place), str(count), str(ranks)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=place)
            if done.returncode:
                found[name]["absent" if verb == "write" else "unread"] = (
                    done.stderr.strip() or "failed"
                ).splitlines()[-1][:120]
                break
            found[name].update(json.loads(done.stdout.strip().splitlines()[-1]))
    return found


def main(verb: str, name: str, place: str, points: str, ranks: str) -> int:
    """Write or read, and say how long it took."""
    peer, folder, rows = PEERS[name](), Path(place), int(points)
    if importlib.util.find_spec(peer.module) is None:
        raise SystemExit("not installed")
    if verb == "read":
        print(json.dumps(peer.read(folder, rows, int(ranks))))
        return 0
    took = peer.write(folder, rows, int(ranks))
    began = time.perf_counter()
    size = _synced_bytes(folder)
    took += time.perf_counter() - began
    print(json.dumps({"rows_s": rows / took, "bytes_per_point": size / rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
