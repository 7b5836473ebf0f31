"""A data folder: what was acknowledged is there once, after every crash, in every table."""

from __future__ import annotations

import itertools
import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from lens.store import applier
from lens.store.engine import Store
from lens.store.errors import FolderOwnedError, StoreBehindError, StoreError, StoreFullError, UnknownRunError
from lens.store.folder import DataFolder, Limits
from lens.store.query import Query
from lens.store.schema import MIGRATIONS, TARGETS

from . import helpers
from .helpers import START, sample, send, step_span

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

ALL_KINDS: list[dict[str, Any]] = [
    sample("train.loss", 2.5, 1, rank=0),
    sample("hw.power", 612.0, None, t_ns=START, rank=1, host="h", device="h/gpu0", labels={"scope": "card"}),
    step_span(0, 1),
    {"type": "span", "kind": "phase", "name": "forward", "t0_ns": START, "t1_ns": START + 5, "rank": 0, "step": 1},
    {
        "type": "span", "kind": "collective", "name": "all_reduce", "t0_ns": START, "t1_ns": START + 9, "rank": 0,
        "step": 1, "attrs": {"group": "dp/0", "seq": 4, "bytes": 1024, "extra": True},
    },
    {
        "type": "vector", "t_ns": START, "metric": "moe.expert.tokens", "values": [1, 2, 3], "rank": 0, "step": 1,
        "layer": 2,
    },
    {"type": "event", "t_ns": START, "kind": "checkpoint.saved", "severity": "info", "text": "ok", "rank": 0},
]  # fmt: skip
RUN = {"run": "r", "world_size": 2, "ranks": [{"rank": 0, "host": "h", "device": "h/gpu0", "vendor": "nvidia"}]}


def counts(folder: DataFolder) -> dict[str, int]:
    """Rows of every table; of the aggregates, what they count."""
    folder.settle()
    found = {
        name: folder.store.scalar(f"SELECT count() FROM lens.{name} FINAL") for name in TARGETS if name in _FINAL
    }
    found |= {
        name: folder.store.scalar(f"SELECT count() FROM lens.{name}") for name in TARGETS if name not in _FINAL
    }
    found["rollup"] = folder.store.scalar("SELECT sum(count) FROM lens.rollup")
    return found


_numbers = itertools.count()
_FINAL = {"runs", "ranks", "series", "rollup_fine", "latest", "progress"}


@given(records=helpers.record_lists)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_come_back_as_they_were_sent(
    folder: DataFolder, query: Query, records: list[dict[str, Any]]
) -> None:
    run = f"run-{next(_numbers)}"
    folder.describe_run({"run": run})
    receipt = send(folder, run, records)
    assert receipt.accepted == len(records)
    described, tables = query.tables(run)
    assert described == {"run": run}
    assert helpers.rows_of(tables) == helpers.rows_of(helpers.decoded(records).tables)


def test_a_batch_sent_again_is_stored_once_and_only_within_its_run_and_source(folder: DataFolder) -> None:
    for run in ("a", "b"):
        folder.describe_run({"run": run})
    assert not send(folder, "a", ALL_KINDS, "agent:1", 7).duplicate
    assert send(folder, "a", ALL_KINDS, "agent:1", 7).duplicate
    assert not send(folder, "a", ALL_KINDS, "agent:2", 7).duplicate
    assert not send(folder, "b", ALL_KINDS, "agent:1", 7).duplicate
    assert not send(folder, "a", ALL_KINDS, "agent:1", 6).duplicate
    assert counts(folder)["steps"] == 4


def test_a_batch_is_known_after_a_restart_applied_or_not(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.describe_run(RUN)
    send(folder, "r", ALL_KINDS, "agent:1", 1)
    folder.settle()
    send(folder, "r", ALL_KINDS, "agent:1", 2)
    die(folder)
    for _ in range(2):
        folder = DataFolder(tmp_path)
        assert send(folder, "r", ALL_KINDS, "agent:1", 1).duplicate
        assert send(folder, "r", ALL_KINDS, "agent:1", 2).duplicate
        assert counts(folder)["steps"] == 2
        assert folder.registry.progress(1).batches == 2
        folder.close()


def die(folder: DataFolder) -> None:
    """End the applier before its next insert, as a crash would, and let go of the files."""

    def crash(*_: Any, **__: Any) -> None:
        raise SystemExit

    folder.applier._insert = crash  # type: ignore[method-assign]
    folder.close()


@pytest.mark.parametrize("target", [*TARGETS, None])
def test_a_crash_between_any_two_inserts_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str | None
) -> None:
    folder = DataFolder(tmp_path)
    folder.describe_run(RUN)
    send(folder, "r", ALL_KINDS, "agent:1", 1)
    folder.settle()
    crash_before(monkeypatch, target)
    folder.describe_run({"run": "other", "world_size": 1, "ranks": [{"rank": 0}]})
    send(folder, "r", [*ALL_KINDS, sample("another.series", 1.0, 5, rank=1)], "agent:1", 2)
    with pytest.raises(StoreBehindError):
        folder.settle()
    folder.close()
    # A second crash, during the recovery from the first.
    folder = DataFolder(tmp_path)
    with suppress(StoreBehindError):
        folder.settle()
    folder.close()
    monkeypatch.undo()
    folder = DataFolder(tmp_path)
    assert counts(folder) == {
        "runs": 2, "ranks": 2, "series": 4, "moments": 2, "samples": 5, "rollup": 5, "rollup_fine": 2, "latest": 3, "steps": 2, "spans": 2,
        "collectives": 2, "vectors": 2, "events": 2, "progress": 2, "batches": 2,
    }  # fmt: skip
    assert folder.registry.progress(1).batches == 2
    assert folder.registry.progress(1).last_step == 1
    folder.close()


def crash_before(monkeypatch: pytest.MonkeyPatch, target: str | None) -> None:
    """Crash before this table is filled; None: after the last one."""
    insert = Store.insert

    def until(self: Store, name: str, rows: Any) -> None:
        if name == target:
            raise SystemExit
        insert(self, name, rows)
        if target is None and name == list(TARGETS)[-1]:
            raise SystemExit

    monkeypatch.setattr(Store, "insert", until)


def test_an_insert_that_fails_is_tried_again_and_done_once(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.describe_run(RUN)
    insert, failures = Store.insert, {"samples": 2, "events": 1}

    def flaky(self: Store, name: str, rows: Any) -> None:
        insert(self, name, rows)
        if failures.get(name, 0):
            failures[name] -= 1
            raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "insert", flaky)
    send(folder, "r", ALL_KINDS)
    found = counts(folder)
    assert (found["samples"], found["rollup"], found["steps"], found["events"]) == (2, 2, 1, 1)
    assert folder.applier.failure is None


def test_a_lost_pointer_costs_no_rows(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.describe_run(RUN)
    for sequence in range(3):
        send(folder, "r", ALL_KINDS, "agent:1", sequence)
        folder.settle()
    folder.close()
    for content in (None, "{", '{"applied": 0}'):
        pointer = tmp_path / "log" / "applied.json"
        pointer.unlink() if content is None else pointer.write_text(content)
        folder = DataFolder(tmp_path)
        assert counts(folder)["samples"] == 6
        assert folder.registry.progress(1).batches == 3
        folder.close()


def test_what_was_acknowledged_can_be_read_at_once(folder: DataFolder, query: Query) -> None:
    folder.describe_run(RUN)
    for step in range(20):
        send(folder, "r", [sample("train.loss", float(step), step, rank=0)])
        assert query.latest("r", "train.loss")[0]["value"] == float(step)


def test_many_senders_at_once_lose_nothing(folder: DataFolder) -> None:
    folder.describe_run(RUN)

    def work(source: int) -> None:
        for sequence in range(30):
            for _ in range(2):
                send(folder, "r", [sample("m", 1.0, sequence, rank=source)], f"s{source}", sequence)

    threads = [threading.Thread(target=work, args=(source,)) for source in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(folder)["samples"] == 150


def test_a_large_group_is_one_part_in_each_table(folder: DataFolder) -> None:
    folder.describe_run(RUN)
    before = folder.store.newest_blocks()
    send(folder, "r", [sample(f"m{index % 7}", 1.0, index, rank=0) for index in range(60_000)])
    folder.settle()
    after = folder.store.newest_blocks()
    assert {name: after[name] - before.get(name, 0) for name in ("samples", "rollup", "rollup_fine", "latest")} == {
        "samples": 1, "rollup": 1, "rollup_fine": 1, "latest": 1,
    }  # fmt: skip


def test_an_unknown_run_takes_no_records_unless_they_describe_it(folder: DataFolder) -> None:
    with pytest.raises(UnknownRunError):
        send(folder, "nobody", ALL_KINDS)
    send(folder, "r", [{"type": "run", **RUN}, *ALL_KINDS])
    assert folder.registry.run("r").world_size == 2


def test_descriptions_are_merged_and_survive(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    assert folder.describe_run({"run": "r", "world_size": 4, "config": {"a": 1}, "tags": ["x"]})[1]
    more = {
        "ranks": [{"rank": 1, "host": "b"}],
        "groups": {"dp": [[0, 1], [2, 3]]},
        "config": {"b": 2},
        "tags": ["y"],
    }
    assert not folder.describe_run({"run": "r", **more})[1]
    folder.describe_run(
        {"run": "r", "ranks": [{"rank": 0, "host": "a"}, {"rank": 1, "device": "b/gpu0", "host": None}]}
    )
    folder.describe_run({"run": "r", "groups": {"dp": [[0, 1]], "ep": [[0, 2]]}, "name": None})
    expected = {
        "run": "r", "world_size": 4, "config": {"a": 1, "b": 2}, "tags": ["x", "y"],
        "ranks": [{"rank": 0, "host": "a"}, {"rank": 1, "host": "b", "device": "b/gpu0"}],
        "groups": {"dp": [[0, 1], [2, 3]], "ep": [[0, 2]]},
    }  # fmt: skip
    assert folder.registry.run("r").described == expected
    die(folder)
    for _ in range(2):
        folder = DataFolder(tmp_path)
        assert folder.registry.run("r").described == expected
        folder.close()


def test_a_folder_has_one_owner(folder: DataFolder, tmp_path: Path) -> None:
    folder.ownership.announce("http://127.0.0.1:1234", folder.path / "token")
    with pytest.raises(FolderOwnedError, match="served at http") as refused:
        DataFolder(folder.path)
    assert refused.value.url == "http://127.0.0.1:1234"
    with pytest.raises(FolderOwnedError):
        Query.open_folder(folder.path)
    with pytest.raises(StoreError, match="no data folder"):
        Query.open_folder(tmp_path / "nothing")


def test_a_folder_can_be_read_without_a_server_after_a_crash(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.describe_run(RUN)
    send(folder, "r", ALL_KINDS)
    die(folder)
    query = Query.open_folder(tmp_path)
    assert [run["run"] for run in query.runs()] == ["r"]
    assert query.tables("r")[1].total == len(ALL_KINDS)
    query.close()


def test_more_waiting_than_the_limit_is_refused_for_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applier, "GATHER_S", 600.0)
    folder = DataFolder(tmp_path, Limits(waiting=1000))
    folder.describe_run(RUN)
    send(folder, "r", ALL_KINDS)
    with pytest.raises(StoreFullError):
        send(folder, "r", ALL_KINDS)
    folder.settle()
    send(folder, "r", ALL_KINDS)
    folder.close()


def test_a_folder_of_a_newer_lens_is_left_alone(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.store.command(f"INSERT INTO lens.migrations VALUES ({len(MIGRATIONS) + 1})")
    folder.close()
    with pytest.raises(StoreError, match="newer lens"):
        DataFolder(tmp_path)


def test_damage_in_the_log_is_reported_and_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(applier, "GATHER_S", 600.0)  # what is in the log alone can be lost with it
    folder = DataFolder(tmp_path)
    folder.describe_run(RUN)
    folder.settle()
    for step in range(3):
        send(folder, "r", [sample("m", 1.0, step)])
    die(folder)
    path = max((tmp_path / "log").glob("*.log"))
    data = path.read_bytes()
    place = data.rindex(json.dumps({"step": 1})[1:-1].encode())
    path.write_bytes(data[:place] + b"#" + data[place + 1 :])
    folder = DataFolder(tmp_path)
    assert counts(folder)["samples"] == 2
    assert "damaged bytes" in caplog.text
    folder.close()
