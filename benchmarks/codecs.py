"""What the codecs of the database make of the kinds of columns that lens stores: bytes a value, and how long one thread
takes to read them. The choice in lens/store/schema.py comes from here.

    python benchmarks/codecs.py [--out FILE] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[1]))
from lens.store.engine import Store

SERIES, STEPS = 256, 8640
ROWS = SERIES * STEPS
VALUES = ("Gorilla, ZSTD(1)", "ZSTD(1)", "ZSTD(3)", "Delta, ZSTD(1)", "Delta, ZSTD(3)", "FPC, ZSTD(1)", "LZ4")
WHOLE = ("Delta, ZSTD(1)", "Delta, ZSTD(3)", "DoubleDelta, ZSTD(1)", "Delta, LZ4", "T64, ZSTD(1)", "ZSTD(1)")
_INSERT = "max_threads = 1, max_insert_threads = 1, min_insert_block_size_rows = 1000000000000, min_insert_block_size_bytes = 0"


def kinds() -> dict[str, np.ndarray]:
    """Values as training reports them, series after series."""
    random = np.random.default_rng(1)
    walk = np.cumsum(random.normal(0, 0.01, (SERIES, STEPS)), 1).reshape(-1)
    memory = np.cumsum(random.integers(-1, 2, (SERIES, STEPS)), 1).reshape(-1) * 2**21
    return {
        "loss, float32": (2 + walk).astype("<f4").astype("<f8"),
        "loss, float64": 2 + walk,
        "norm, float32": random.normal(1, 0.1, ROWS).astype("<f4").astype("<f8"),
        "gauge, three decimals": np.round(random.normal(600, 8, ROWS), 3),
        "watts, one decimal": np.round(random.normal(650, 20, ROWS), 1),
        "slow, two decimals": np.round(0.5 + walk, 2),
        "percent": random.integers(90, 101, ROWS).astype("<f8"),
        "bytes of memory": (60e9 + memory).astype("<f8"),
        "seconds from nanoseconds": np.round(random.normal(0.35, 0.01, ROWS), 9),
        "counter": np.tile(np.arange(STEPS), SERIES) * 1000.0 + np.repeat(np.arange(SERIES), STEPS) * 17,
        "constant": np.full(ROWS, 3.5),
    }


def whole_numbers() -> dict[str, np.ndarray]:
    """Steps, and times with a moment of its own for each rank and step."""
    step = np.tile(np.arange(STEPS), SERIES)
    jitter = np.random.default_rng(2).integers(0, 50_000_000, ROWS)
    return {"step": step, "time": 1_700_000_000_000_000_000 + step * 10_000_000_000 + jitter}


def measured(
    store: Store, kind: str, codecs: tuple[str, ...], columns: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Bytes a value and ms to read, by kind of column and codec."""
    rows = []
    names = [f"c{index}" for index in range(len(codecs))]
    for number, (about, values) in enumerate(columns.items()):
        table = f"lens.codecs_{kind.lower()}_{number}"
        made = ", ".join(f"{name} {kind} CODEC({codec})" for name, codec in zip(names, codecs, strict=True))
        store.command(
            f"CREATE TABLE {table} ({made}) ENGINE = MergeTree ORDER BY tuple() SETTINGS min_bytes_for_wide_part = 0"
        )
        found = pa.table(dict.fromkeys(names, pa.array(values)))
        _insert(store, table, found)
        sizes = store.query(
            "SELECT column, sum(column_data_compressed_bytes) AS bytes FROM system.parts_columns "
            f"WHERE active AND database = 'lens' AND table = '{table.partition('.')[2]}' GROUP BY column"
        ).to_pylist()
        size = {row["column"]: row["bytes"] for row in sizes}
        for name, codec in zip(names, codecs, strict=True):
            rows.append(
                {"column": about, "codec": codec, "bytes": size[name] / ROWS, "ms": _read(store, table, name)}
            )
        store.command(f"DROP TABLE {table}")
    return rows


def _insert(store: Store, table: str, rows: pa.Table) -> None:
    session = store.open_session()
    # chDB finds the table of Python(rows) by its name in this frame.
    session.query(f"INSERT INTO {table} SELECT * FROM Python(rows) SETTINGS {_INSERT}", "Null")
    store.close_session(session)


def _read(store: Store, table: str, column: str) -> float:
    took = []
    for _ in range(5):
        began = time.perf_counter()
        store.query(
            f"SELECT max({column}) FROM {table} SETTINGS max_threads = 1, optimize_use_implicit_projections = 0"
        )
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


def page(rows: list[dict[str, Any]], codecs: tuple[str, ...]) -> str:
    """A line a kind of column, a column a codec: bytes a value, then ms to read."""
    by = {(row["column"], row["codec"]): row for row in rows}
    lines = [f"| | {' | '.join(codecs)} |", "|---" * (len(codecs) + 1) + "|"]
    columns = list(dict.fromkeys(row["column"] for row in rows))
    for about in columns:
        cells = (f"{by[about, codec]['bytes']:.2f} · {by[about, codec]['ms']:.0f}" for codec in codecs)
        lines.append(f"| {about} | {' | '.join(cells)} |")
    means = (
        [statistics.mean(by[about, codec][what] for about in columns) for codec in codecs]
        for what in ("bytes", "ms")
    )
    cells = (f"{size:.2f} · {ms:.0f}" for size, ms in zip(*means, strict=True))
    lines.append(f"| *on average* | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--out", type=Path, help="write the page there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lens-codecs-") as folder:
        store = Store(f"chdb://{folder}/db")
        values, whole = (
            measured(store, "Float64", VALUES, kinds()),
            measured(store, "Int64", WHOLE, whole_numbers()),
        )
        store.close()
    said = f"Values:\n\n{page(values, VALUES)}\n\nWhole numbers:\n\n{page(whole, WHOLE)}"
    print(said)
    if options.out:
        options.out.write_text(
            f"# Codecs\n\n`python benchmarks/codecs.py`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores. "
            f"{ROWS:,} rows of {SERIES} series;\nbytes a value · ms to read all of them with one thread.\n\n{said}\n"
        )
    if options.json:
        print(json.dumps({"values": values, "whole": whole}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
