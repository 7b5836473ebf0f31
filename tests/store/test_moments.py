"""Times of samples: kept once for each rank and step, and read back to the nanosecond whatever happens between."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lens.slots import NULL
from lens.store import moments as times_kept
from lens.store.errors import StoreBehindError
from lens.store.export import samples
from lens.store.export.exporter import Wanted
from lens.store.folder import DataFolder
from lens.store.moments import Moments
from lens.store.query import Query
from lens.store.relations import Selection
from lens.store.upkeep.keeper import Upkeep

from .helpers import SECOND, START, decoded, rows_of, sample, send
from .test_folder import crash_before

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

DAY = 86_400 * SECOND


def any_samples(chance: random.Random, count: int) -> list[dict[str, Any]]:
    """Samples of some ranks and steps: most at the time of their step, some later, some without a step, a few absurd."""
    found = []
    for _ in range(count):
        rank, step = chance.choice([None, 0, 1, 2, 3]), chance.choice([None, *range(40)])
        if chance.random() < 0.02:
            rank, step = chance.choice([0, 1 << 24]), chance.choice([1 << 39, (1 << 62) - 1, 3])
        t_ns = START + (step or 0) % 1000 * SECOND + (rank or 0) % 100 * 1000
        if chance.random() < 0.2:
            t_ns = chance.choice([t_ns + chance.randrange(10**6), chance.randrange(2**62), 0])
        found.append(sample(chance.choice("abc"), chance.random(), step, rank=rank, t_ns=t_ns))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_every_time_is_read_back_whatever_order_and_however_often_the_store_is_opened(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, sent = random.Random(seed), []
    monkeypatch.setattr(times_kept, "MOST_KEPT", 30)
    monkeypatch.setattr(times_kept, "MOST_RUNS", 1 + seed % 2)
    monkeypatch.setattr(samples, "_FEW_RANKS", seed % 3)
    monkeypatch.setattr(times_kept, "WORTH_A_LIST", 8)
    monkeypatch.setattr(times_kept, "STEPS_AT_ONCE", 16)
    folder = DataFolder(tmp_path)
    folder.describe_run({"run": "other"})
    folder.describe_run({"run": "r"})
    for _ in range(8):
        batch = any_samples(chance, chance.randrange(1, 60))
        send(folder, "other", any_samples(chance, 5))
        send(folder, "r", batch)
        sent += batch
        folder.settle()
        if chance.random() < 0.4:
            folder.close()
            folder = DataFolder(tmp_path)
    query = Query(folder)
    wanted = rows_of(decoded(sent).tables)["samples"]
    assert rows_of(query.tables("r")[1])["samples"] == wanted
    expected = sorted(each["t_ns"] for each in sent)
    by_sql = query.sql("SELECT t_ns FROM samples", "r").table.column(0).to_pylist()
    assert sorted(by_sql) == expected
    exported = pa.ipc.open_stream(b"".join(query.export("r", Wanted("arrow")).parts)).read_all()
    assert sorted(exported.column("t_ns").to_pylist()) == expected
    pairs = {(each["rank"], each["step"]) for each in sent if each["step"] is not None and each["step"] < 1 << 39}
    stored = folder.store.query("SELECT rank, step FROM lens.moments WHERE run = 2").to_pylist()
    assert len(stored) == len({(row["rank"], row["step"]) for row in stored})
    assert len(stored) == len({(rank, step) for rank, step in pairs if rank is None or rank < 1 << 23})
    folder.close()


def test_a_time_that_many_metrics_share_is_kept_once(folder: DataFolder) -> None:
    folder.describe_run({"run": "r"})
    send(folder, "r", [
        sample(f"m{metric}", 1.0, step, rank=rank, t_ns=START + step * SECOND + rank * 977)
        for metric in range(20) for step in range(30) for rank in range(4)
    ])  # fmt: skip
    folder.settle()
    assert folder.store.scalar("SELECT count() FROM lens.moments") == 30 * 4
    assert folder.store.scalar("SELECT count() FROM lens.samples WHERE t_ns != 0") == 0
    assert folder.store.scalar("SELECT max(t_ns) FROM lens.latest") == START + 29 * SECOND + 3 * 977


@pytest.mark.parametrize("target", ["moments", "samples", "rollup", None])
def test_a_crash_between_moments_and_samples_changes_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str | None
) -> None:
    folder = DataFolder(tmp_path)
    folder.describe_run({"run": "r"})
    before = any_samples(random.Random(5), 60)
    send(folder, "r", before)
    folder.settle()
    crash_before(monkeypatch, target)
    after = any_samples(random.Random(6), 60)
    send(folder, "r", after)
    for _ in range(2):
        with suppress(StoreBehindError):
            folder.settle()
        folder.close()
        folder = DataFolder(tmp_path)
    folder.close()
    monkeypatch.undo()
    folder = DataFolder(tmp_path)
    folder.settle()
    found = Query(folder).tables("r")[1]
    assert rows_of(found)["samples"] == rows_of(decoded(before + after).tables)["samples"]
    folder.close()


def test_a_step_that_comes_again_after_its_records_were_deleted_has_its_own_time(folder: DataFolder) -> None:
    folder.describe_run({"run": "r"})
    now = folder.registry.run("r").created_ns
    send(folder, "r", [sample("m", 1.0, step, rank=0, t_ns=now - 3 * DAY + step) for step in range(50)])
    folder.settle()
    upkeep = Upkeep(folder)
    upkeep.set_retention(None, 86_400)
    assert upkeep.tidy()["moments"] == 50
    again = [sample("m", 2.0, step, rank=0, t_ns=now + step) for step in range(10, 20)]
    send(folder, "r", again)
    assert rows_of(Query(folder).tables("r")[1])["samples"] == rows_of(decoded(again).tables)["samples"]


def test_old_times_of_a_step_go_and_a_newer_one_of_the_same_step_keeps_its_bucket(folder: DataFolder) -> None:
    folder.describe_run({"run": "r"})
    now = folder.registry.run("r").created_ns
    old = [sample("m", 1.0, step, rank=0, t_ns=now - 3 * DAY) for step in (5, 205)]
    newer = sample("m", 2.0, 205, rank=0, t_ns=now)
    send(folder, "r", [*old, newer])
    folder.settle()
    upkeep = Upkeep(folder)
    upkeep.set_retention(None, 86_400)
    upkeep.tidy()
    found = Query(folder).tables("r")[1]
    assert rows_of(found)["samples"] == rows_of(decoded([old[1], newer]).tables)["samples"]


def test_a_run_over_its_own_times_is_drawn_where_they_are(folder: DataFolder, query: Query) -> None:
    folder.describe_run({"run": "r"})
    send(folder, "r", [sample("m", float(step), step, rank=rank, t_ns=START + step * SECOND + rank)
                       for step in range(5) for rank in (0, 1)])  # fmt: skip
    lines = query.series("r", Selection("m"), axis="time")["series"]
    assert [line["x"][0] for line in lines] == [START, START]
    assert lines[1]["x"][-1] > START + 3 * SECOND
    assert query.series("r", Selection("m", ranks=(1,)), axis="time")["from"] == START + 1


def test_a_question_without_times_reads_no_moments(
    folder: DataFolder, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.describe_run({"run": "r"})
    send(folder, "r", [sample("m", 2.0, step, rank=0) for step in range(3)])
    asked: list[str] = []
    ask = folder.store.query

    def heard(sql: str, session: Any = None) -> pa.Table:
        asked.append(sql)
        return ask(sql, session)

    monkeypatch.setattr(folder.store, "query", heard)

    def reads_moments(sql: str) -> bool:
        asked.clear()
        query.sql(sql, "r")
        return "lens.moments" in asked[-1]

    assert not reads_moments("SELECT count(*), sum(value) FROM samples WHERE metric = 'm' AND step > 0")
    assert reads_moments("SELECT max(t_ns) FROM samples")
    assert reads_moments("SELECT * FROM samples")
    assert reads_moments("SELECT value FROM samples AS s ORDER BY s.t_ns")
    assert reads_moments("SELECT x.* FROM (SELECT value FROM samples) AS x")
    assert reads_moments("SELECT COLUMNS(t_ns) FROM samples")


def test_rows_that_have_no_moment_are_left_as_they_are(folder: DataFolder) -> None:
    rows = pa.table({
        "run": np.array([1, 1], "<u4"), "mid": np.array([3, 3], "<u8"), "rank": np.array([0, 0], "<i4"),
        "step": np.array([NULL, 1 << 60], "<i8"), "t_ns": np.array([7, 8], "<i8"), "value": np.array([1.0, 2.0]),
    })  # fmt: skip
    found = Moments(folder.store).split(rows)
    assert list(found) == ["samples"]
    assert found["samples"].equals(rows)
