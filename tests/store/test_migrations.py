"""Databases of every schema since the first: brought up to date when opened, whatever they hold, wherever that stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lens.store import engine
from lens.store.engine import Store
from lens.store.errors import StoreError
from lens.store.folder import DataFolder
from lens.store.query import Query
from lens.store.relations import Selection
from lens.store.schema import MIGRATIONS

from . import helpers
from .helpers import DIE_AT, START, sample, send
from .test_folder import ALL_KINDS, RUN

FIRST = [
    each.strip() for each in (Path(__file__).parent / "first_schema.sql").read_text().split(";\n") if each.strip()
]
"""A database of the first schema, statement by statement: its tables, then run r with `ALL_KINDS`, then its version."""
OPEN_AND_DIE = f"""{DIE_AT}
Store("chdb://" + sys.argv[1])
print("opened")
os._exit(0)
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A data folder whose database has the first schema."""
    from chdb import session

    opened = session.Session(str(tmp_path / "data" / "chdb"))
    for statement in FIRST:
        opened.query(statement)
    opened.close()
    return tmp_path / "data"


def tables_of(store: Store) -> set[str]:
    found = store.query("SELECT name FROM system.tables WHERE database = 'lens'").column(0).to_pylist()
    return set(found)


def test_the_first_migration_is_what_it_was() -> None:
    assert MIGRATIONS[0] == [each for each in FIRST if each.startswith("CREATE TABLE")][1:]


def test_a_database_of_the_first_schema_gives_the_same_records(old: Path) -> None:
    folder = DataFolder(old)
    query = Query(folder)
    described, tables = query.tables("r")
    assert described == RUN
    assert helpers.rows_of(tables) == helpers.rows_of(helpers.decoded(ALL_KINDS).tables)
    assert [each["value"] for each in query.latest("r", "train.loss", "hw.power")] == [2.5, 612.0]
    assert send(folder, "r", ALL_KINDS, "agent:1", 7).duplicate
    assert not send(folder, "r", ALL_KINDS, "agent:1", 8).duplicate
    folder.settle()
    twice = query.tables("r")[1]
    assert helpers.rows_of(twice)["samples"] == helpers.rows_of(helpers.decoded(ALL_KINDS * 2).tables)["samples"]


def test_a_run_of_an_older_schema_goes_on_beside_one_of_this(old: Path) -> None:
    folder = DataFolder(old)
    query = Query(folder)
    later = [sample("train.loss", 1.5, 1, rank=0, t_ns=START + 7), sample("train.loss", 1.0, 2, rank=0)]
    send(folder, "r", later)
    folder.describe_run({"run": "new"})
    send(folder, "new", later)
    both = {run: helpers.rows_of(query.tables(run)[1])["samples"] for run in ("r", "new")}
    assert both["new"] == helpers.rows_of(helpers.decoded(later).tables)["samples"]
    assert both["r"] == helpers.rows_of(helpers.decoded(ALL_KINDS + later).tables)["samples"]
    assert folder.store.query("SELECT run, step FROM lens.moments ORDER BY step").column(0).to_pylist() == [2, 2]
    maps = [query.heatmap(run, Selection("train.loss")) for run in ("r", "new")]
    assert maps[1]["values"] == [[1.5, 1.0]]
    assert maps[0]["values"][0][-2:] == [2.5, 1.0]


def test_the_version_is_in_the_store_and_each_migration_runs_once(old: Path, tmp_path: Path) -> None:
    new = Store(f"chdb://{tmp_path / 'new'}")
    assert new.version == len(MIGRATIONS)
    expected = tables_of(new)
    new.close()
    for _ in range(2):
        store = Store(f"chdb://{old / 'chdb'}")
        assert store.version == len(MIGRATIONS)
        noted = store.query("SELECT version FROM lens.migrations ORDER BY version").column(0).to_pylist()
        assert noted == list(range(1, len(MIGRATIONS) + 1))
        assert tables_of(store) == expected
        store.close()


@pytest.mark.processes
def test_a_process_killed_at_any_statement_of_a_migration_is_followed_by_one_that_goes_on(old: Path) -> None:
    # Two statements of every opening, then those of the migration that is left and the note of its number.
    statements = 2 + max(len(each) + 1 for each in MIGRATIONS[1:])
    for survived in range(statements + 1):
        done = subprocess.run(
            [sys.executable, "-c", OPEN_AND_DIE, str(old / "chdb"), str(survived)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode == 0:
            assert done.stdout == "opened\n"
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        pytest.fail("never opened")
    assert survived == statements  # each death before was one statement later; the newest migration is the longest
    store = Store(f"chdb://{old / 'chdb'}")
    assert store.version == len(MIGRATIONS)
    assert store.scalar("SELECT sum(value) FROM lens.samples") == 614.5
    store.close()


def test_a_statement_that_fails_leaves_the_version_before_it(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine, "MIGRATIONS", [*MIGRATIONS, ["CREATE TABLE lens.broken (a Nonsense) ENGINE = Memory"]]
    )
    with pytest.raises(StoreError, match="Nonsense"):
        Store(f"chdb://{old / 'chdb'}")
    monkeypatch.undo()
    store = Store(f"chdb://{old / 'chdb'}")
    assert store.version == len(MIGRATIONS)
    store.close()


def test_a_store_of_a_newer_lens_is_refused_and_left_as_it_is(old: Path) -> None:
    store = Store(f"chdb://{old / 'chdb'}")
    newer = len(MIGRATIONS) + 1
    store.command(f"INSERT INTO lens.migrations VALUES ({newer})")
    before = tables_of(store)
    store.close()
    with pytest.raises(
        StoreError, match=rf"newer lens \(schema {newer}, this one knows {len(MIGRATIONS)}\)"
    ) as refused:
        Store(f"chdb://{old / 'chdb'}")
    assert "upgrade lens" in refused.value.hint
    from chdb import session

    opened = session.Session(str(old / "chdb"))
    left = str(opened.query("SELECT name FROM system.tables WHERE database = 'lens'", "TSV")).split()
    opened.close()
    assert set(left) == before
