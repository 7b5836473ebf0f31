"""A ClickHouse server keeps the tables: written and read over its HTTP interface, here answered by a stand-in.

`make test-clickhouse` runs the tests of folder, reads, export and upkeep like this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from lens.store.engine import Store
from lens.store.errors import BadQueryError, StoreBehindError, StoreError
from lens.store.export.exporter import Wanted
from lens.store.folder import DataFolder
from lens.store.grids import Window
from lens.store.query import Query
from lens.store.relations import Selection

from .clickhouse import ClickHouse
from .helpers import sample, send, step_span


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    started = ClickHouse(tmp_path_factory.mktemp("clickhouse") / "db")
    yield started
    started.stop()


def test_what_is_sent_is_kept_by_the_server_and_read_from_it(tmp_path: Path, server: ClickHouse) -> None:
    folder = DataFolder(tmp_path / "data", dsn=server.url)
    folder.describe_run({"run": "over http", "world_size": 2})
    records = [sample("train.loss", 3.0 - step, step, rank=0, labels={"é": "'"}) for step in range(5)]
    for _ in range(2):
        send(folder, "over http", [*records, step_span(1, 4)], "agent:1", 7)
    query = Query(folder)
    assert query.series("over http", Selection("train.loss"), Window())["series"][0]["mean"] == [
        3.0,
        2.0,
        1.0,
        0.0,
        -1.0,
    ]
    answer = query.sql_reply("SELECT labels['é'] AS l, count() AS n FROM samples GROUP BY l", "over http")
    assert answer["rows"] == [["'", 5]]
    with pytest.raises(BadQueryError, match="nobody"):
        query.sql("SELECT nobody FROM samples", "over http")
    stream = b"".join(query.export("over http", Wanted("arrow", "samples")).parts)
    assert pa.ipc.open_stream(stream).read_all().num_rows == 5
    folder.close()
    with pytest.raises(StoreError, match="are kept by 127"):
        DataFolder(tmp_path / "data")
    again = DataFolder(tmp_path / "data", dsn=server.url)
    assert (again.registry.run("over http").world_size, again.registry.progress(1).batches) == (2, 1)
    again.close()


def test_a_group_that_comes_again_is_kept_once_where_tables_know_groups(server: ClickHouse) -> None:
    store = Store(server.url)
    store.command("ALTER TABLE lens.events MODIFY SETTING non_replicated_deduplication_window = 100")
    rows = pa.table({
        "run": pa.array([9], pa.uint32()), "t_ns": [1], "kind": ["k"], "severity": pa.array([0], pa.int8()), "text": [""],
        "rank": pa.array([0], pa.int32()), "host": [""], "device": [""], "step": [1], "attrs": [""],
    })  # fmt: skip
    for group in ("log:0:8", "log:0:8", "log:8:16"):
        store.begin_group(group)
        store.insert("events", rows)
    assert store.scalar("SELECT count() FROM lens.events WHERE run = 9") == 2
    store.close()


def test_a_server_that_goes_away_loses_nothing(tmp_path: Path) -> None:
    server = ClickHouse(tmp_path / "db")
    folder = DataFolder(tmp_path / "data", dsn=server.url)
    folder.describe_run({"run": "r"})
    folder.settle()
    server.stop()
    send(folder, "r", [sample("m", 1.0, 1, rank=0)], "a", 1)  # acknowledged: it is in the log
    with pytest.raises(StoreBehindError):
        folder.settle(0.5)
    _until(lambda: "does not answer" in str(folder.applier.failure))
    folder.close()
    server = ClickHouse(tmp_path / "db")
    (tmp_path / "data" / "clickhouse").write_text(server.url.removeprefix("http://"))  # it has moved
    folder = DataFolder(tmp_path / "data", dsn=server.url)
    _until(lambda: folder.store.scalar("SELECT count() FROM lens.samples") == 1)
    folder.close()
    server.stop()


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
