"""What is deleted is gone from every table, what is newer stays as it was, and no batch is taken twice for it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lens.store.errors import UnknownRunError
from lens.store.folder import DataFolder
from lens.store.query import Query
from lens.store.relations import Selection
from lens.store.schema import STEP_BUCKET, TARGETS
from lens.store.upkeep import keeper
from lens.store.upkeep.keeper import Upkeep
from lens.store.upkeep.retention import Expired, expired

from . import helpers
from .helpers import DIE_AT, SECOND, ndjson, sample, send, step_span
from .test_folder import ALL_KINDS, counts

DAY = 86_400
_numbers = itertools.count()
_RECORDS = (
    "samples",
    "moments",
    "rollup",
    "rollup_fine",
    "latest",
    "steps",
    "spans",
    "collectives",
    "vectors",
    "events",
)


def aged(records: list[dict[str, Any]], age_s: float, first_step: int = 0) -> list[dict[str, Any]]:
    """The records as if they had come so long ago, their steps from `first_step` on."""
    shift = time.time_ns() - int(age_s * SECOND) - helpers.START
    return [
        {
            key: value + shift if key.endswith("_ns") else first_step + value if key == "step" and value else value
            for key, value in record.items()
        }
        for record in records
    ]


def rows(folder: DataFolder, run: str) -> dict[str, int]:
    number = folder.registry.run(run).number
    return {name: folder.store.scalar(f"SELECT count() FROM lens.{name} WHERE run = {number}") for name in TARGETS}


@pytest.fixture
def upkeep(folder: DataFolder) -> Upkeep:
    return Upkeep(folder)


def test_what_is_past_its_retention_goes_from_every_table_and_nothing_else(
    folder: DataFolder, query: Query, upkeep: Upkeep
) -> None:
    folder.describe_run({"run": "r"})
    old, new = aged(ALL_KINDS, 3 * DAY), aged(ALL_KINDS, DAY / 2, first_step=10 * STEP_BUCKET)
    send(folder, "r", old, "agent:1", 0)
    send(folder, "r", new, "agent:1", 1)
    folder.settle()
    upkeep.set_retention(None, DAY)
    removed = upkeep.compact()["removed"]
    assert set(removed) == set(_RECORDS) - {"latest"}  # the newest sample of each series is of the second batch
    assert removed["samples"] == removed["rollup"] == 2
    assert helpers.rows_of(query.tables("r")[1]) == helpers.rows_of(helpers.decoded(new).tables)
    assert folder.store.scalar("SELECT sum(count) FROM lens.rollup") == 2
    assert upkeep.tidy() == {}


def test_a_run_whose_records_are_all_too_old_is_known_and_takes_none_of_its_batches_again(
    folder: DataFolder, query: Query, upkeep: Upkeep
) -> None:
    folder.describe_run({"run": "r"})
    records = aged(ALL_KINDS, 3 * DAY)
    send(folder, "r", records, "agent:1", 0)
    folder.settle()
    upkeep.set_retention(None, DAY)
    upkeep.tidy()
    kept = rows(folder, "r")
    assert {name for name, count in kept.items() if count} == {"runs", "series", "progress", "batches"}
    assert query.run("r")["last_step"] == 1
    assert send(folder, "r", records, "agent:1", 0).duplicate
    folder.settle()
    assert rows(folder, "r") == kept


def test_the_ledger_of_batches_holds_after_pruning_and_opening_again(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.describe_run({"run": "r"})
    records = aged(ALL_KINDS, 3 * DAY)
    send(folder, "r", records, "agent:1", 0)
    folder.settle()
    upkeep = Upkeep(folder)
    upkeep.set_retention(None, DAY)
    upkeep.compact()
    folder.close()
    folder = DataFolder(tmp_path)
    assert send(folder, "r", records, "agent:1", 0).duplicate
    assert counts(folder)["samples"] == 0
    assert Upkeep(folder).retention() == {"keep_s": DAY, "runs": []}
    folder.close()


def test_a_run_may_have_a_rule_of_its_own_or_follow_again(folder: DataFolder, upkeep: Upkeep) -> None:
    for run in ("short", "long", "every"):
        folder.describe_run({"run": run})
        send(folder, run, aged(ALL_KINDS, 3 * DAY))
    folder.settle()
    upkeep.set_retention("short", DAY)
    upkeep.tidy()
    assert [rows(folder, run)["samples"] for run in ("short", "long", "every")] == [0, 2, 2]
    upkeep.set_retention("long", None)
    said = upkeep.set_retention(None, 2 * DAY)
    assert said == {"keep_s": 2 * DAY, "runs": [{"run": "long", "keep_s": None}, {"run": "short", "keep_s": DAY}]}
    upkeep.tidy()
    assert [rows(folder, run)["samples"] for run in ("long", "every")] == [2, 0]
    upkeep.set_retention("long", None, follow=True)
    upkeep.tidy()
    assert rows(folder, "long")["samples"] == 0
    assert [each["run"] for each in upkeep.retention()["runs"]] == ["short"]
    upkeep.set_retention(None, None)
    assert upkeep.retention()["keep_s"] is None


def test_a_step_stays_whole_as_long_as_its_bucket_holds_anything_newer(
    folder: DataFolder, query: Query, upkeep: Upkeep
) -> None:
    folder.describe_run({"run": "r"})
    # The first attempt reached step 250; a restart, days later, did steps 100 to 149 again.
    first = aged([step_span(0, step) for step in range(251)], 3 * DAY)
    again = aged([step_span(0, step) for step in range(50)], DAY / 2)
    again = [{**record, "step": record["step"] + 100} for record in again]
    send(folder, "r", [*first, *again])
    folder.settle()
    upkeep.set_retention(None, DAY)
    upkeep.tidy()
    steps = query.tables("r")[1].steps["step"].tolist()
    assert sorted(set(steps)) == list(range(100, 200))
    assert len(steps) == 150


def test_what_comes_while_the_store_looks_for_old_records_stays(
    folder: DataFolder, query: Query, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.describe_run({"run": "r"})
    send(folder, "r", aged([step_span(0, step) for step in range(300)], 3 * DAY))
    folder.settle()
    upkeep.set_retention(None, DAY)

    def look_slowly(*arguments: Any) -> Expired:
        found = expired(*arguments)
        send(folder, "r", [{**aged([step_span(0, 0)], 0)[0], "step": 150}])
        folder.settle()
        return found

    monkeypatch.setattr(keeper, "expired", look_slowly)
    upkeep.tidy()
    steps = query.tables("r")[1].steps["step"].tolist()
    assert sorted(steps) == sorted([150, *range(100, 200)])


@given(records=helpers.record_lists, before=st.integers(0, 2**62))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_stays_is_what_the_rule_says_and_the_rollup_speaks_of_it_alone(
    folder: DataFolder, query: Query, records: list[dict[str, Any]], before: int
) -> None:
    run = f"run-{next(_numbers)}"
    folder.describe_run({"run": run})
    send(folder, run, records)
    folder.settle()
    number = folder.registry.run(run).number
    Upkeep(folder)._prune_run(number, before)
    before -= before % 10_000_000_000

    def newest(record: dict[str, Any]) -> int:
        done = (record.get("attrs") or {}).get("t_done_ns", 0) if record.get("kind") == "collective" else 0
        return max(record.get("t_ns", 0), record.get("t1_ns", 0), done)

    def bucket(record: dict[str, Any]) -> int | None:
        return None if record.get("step") is None else record["step"] // STEP_BUCKET

    kept_buckets = {bucket(record) for record in records if newest(record) >= before}
    kept = [
        record
        for record in records
        if (newest(record) >= before if bucket(record) is None else bucket(record) in kept_buckets)
    ]
    assert helpers.rows_of(query.tables(run)[1]) == helpers.rows_of(helpers.decoded(kept).tables)
    found = folder.store.scalar(f"SELECT sum(count) + sum(odd) FROM lens.rollup WHERE run = {number}")
    assert found == sum(record["type"] == "sample" for record in kept)
    assert not expired(folder.store, number, before)


def test_a_verdict_is_worked_out_anew_from_what_is_left(folder: DataFolder, query: Query, upkeep: Upkeep) -> None:
    folder.describe_run({"run": "r", "world_size": 1})
    send(folder, "r", aged([step_span(0, step) for step in range(100)], 3 * DAY))
    assert query.diagnosis("r")["upto_step"] == 99
    assert query.ledger("r")["to_step"] is not None
    upkeep.set_retention("r", DAY)
    upkeep.tidy()
    assert query.ledger("r")["to_step"] is None


def test_a_deleted_run_is_gone_and_its_name_free(folder: DataFolder, query: Query, upkeep: Upkeep) -> None:
    for run in ("a", "b"):
        folder.describe_run({"run": run})
        send(folder, run, ALL_KINDS, "agent:1", 0)
    folder.settle()
    number = folder.registry.run("a").number
    before = rows(folder, "b")
    removed = upkeep.delete_run("a")["removed"]
    assert removed["samples"] == 2
    assert removed["batches"] == 1
    upkeep.tidy()
    for table in TARGETS:
        assert folder.store.scalar(f"SELECT count() FROM lens.{table} WHERE run = {number}") == 0
    assert [run["run"] for run in query.runs()] == ["b"]
    assert rows(folder, "b") == before
    with pytest.raises(UnknownRunError):
        send(folder, "a", ALL_KINDS, "agent:1", 0)
    with pytest.raises(UnknownRunError):
        upkeep.delete_run("a")
    run, is_new = folder.describe_run({"run": "a"})
    assert is_new
    assert run.number != number
    assert not send(folder, "a", ALL_KINDS, "agent:1", 0).duplicate
    folder.settle()
    assert rows(folder, "a") == before


def test_a_deleted_run_stays_gone_when_the_log_is_taken_again_from_its_start(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    for run in ("a", "b"):
        folder.describe_run({"run": run})
        send(folder, run, ALL_KINDS, "agent:1", 0)
    folder.settle()
    Upkeep(folder).delete_run("a")
    folder.close()
    (tmp_path / "log" / "applied.json").unlink()
    folder = DataFolder(tmp_path)
    folder.settle()
    assert [run.id for run in folder.registry.runs()] == ["b"]
    Upkeep(folder).tidy()  # rows of a deleted run leave the disk some time after nobody can read them any more
    assert counts(folder)["samples"] == 2
    assert folder.describe_run({"run": "c"})[0].number == 3
    folder.close()


DELETE_AND_DIE = f"""
import sys
from pathlib import Path
from lens.store.folder import DataFolder
from lens.store.upkeep.keeper import Upkeep
folder = DataFolder(Path(sys.argv[1]))
{DIE_AT}
Upkeep(folder).delete_run("a")
os._exit(0)
"""


@pytest.mark.skipif(
    "LENS_CLICKHOUSE_URL" in os.environ, reason="a process of its own opens the folder's own database"
)
@pytest.mark.processes
@pytest.mark.parametrize("survived", [0, 1, 4])
def test_a_server_killed_while_it_deletes_has_deleted_or_not(tmp_path: Path, survived: int) -> None:
    folder = DataFolder(tmp_path)
    for run in ("a", "b"):
        folder.describe_run({"run": run})
        send(folder, run, ALL_KINDS)
    folder.close()
    done = subprocess.run([sys.executable, "-c", DELETE_AND_DIE, str(tmp_path), str(survived)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    folder = DataFolder(tmp_path)
    known = {run.id for run in folder.registry.runs()}
    assert known == ({"a", "b"} if survived == 0 else {"b"})
    Upkeep(folder).tidy()
    assert counts(folder)["samples"] == 2 * len(known)
    folder.close()


def merges(folder: DataFolder, word: str) -> None:
    """STOP or START what the database merges by itself."""
    for table in TARGETS:
        folder.store.command(f"SYSTEM {word} MERGES lens.{table}")


def test_compaction_merges_parts_and_says_so(
    folder: DataFolder, query: Query, upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parts lie as they were inserted, however long that took, until the compaction has counted them.
    merges(folder, "STOP")
    tidy = upkeep.tidy
    monkeypatch.setattr(upkeep, "tidy", lambda: (merges(folder, "START"), tidy())[1])
    folder.describe_run({"run": "r"})
    for step in range(5):
        send(folder, "r", [sample("m", float(step), step)])
        folder.settle()
    said = upkeep.compact()
    assert said["status"] == "done"
    assert said["before"]["parts"] > said["after"]["parts"]
    assert said["after"]["bytes"] < said["before"]["bytes"]
    (samples,) = [each for each in upkeep.info()["tables"] if each["table"] == "samples"]
    assert (samples["rows"], samples["parts"]) == (5, 1)
    assert query.series("r", Selection("m"))["series"][0]["mean"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_the_size_of_a_store_is_told_by_table_and_run(folder: DataFolder, upkeep: Upkeep) -> None:
    for run, count in (("a", 1), ("b", 3)):
        folder.describe_run({"run": run})
        send(folder, run, [sample("m", 1.0, step) for step in range(count)])
    said = upkeep.info()
    assert {run["run"]: run["tables"]["samples"] for run in said["runs"]} == {"a": 1, "b": 3}
    assert said["samples"] == 4
    assert said["bytes"] == sum(table["bytes"] for table in said["tables"])
    assert sum(run["bytes_about"] for run in said["runs"]) == pytest.approx(said["bytes"], abs=len(said["runs"]))
    assert said["bytes_per_sample"] > 0
    assert said["schema"]["version"] == said["schema"]["newest"]


def test_an_empty_store_has_no_bytes_a_sample(upkeep: Upkeep) -> None:
    assert upkeep.info()["bytes_per_sample"] is None


def test_records_past_their_retention_go_on_schedule(folder: DataFolder) -> None:
    folder.describe_run({"run": "r"})
    send(folder, "r", aged(ALL_KINDS, 3 * DAY))
    folder.settle()
    upkeep = Upkeep(folder, every_s=0.05)
    upkeep.start()
    upkeep.set_retention(None, DAY)
    deadline = time.monotonic() + 60
    while rows(folder, "r")["samples"] and time.monotonic() < deadline:
        time.sleep(0.05)
    upkeep.stop()
    assert rows(folder, "r")["samples"] == 0


@pytest.fixture
def unscheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server looks for old records when it is asked to, and not beside that."""
    monkeypatch.setattr(Upkeep, "start", lambda upkeep: None)


def test_the_store_over_http(unscheduled: None, client: TestClient) -> None:
    for run in ("a", "b"):
        client.post("/api/v1/runs", json={"run": run})
        body = ndjson(aged(ALL_KINDS, 3 * DAY))
        client.post(f"/api/v1/runs/{run}/records", content=body, headers={"content-type": "application/x-ndjson"})
    assert client.get("/api/v1/store").json()["samples"] == 4
    put = client.put("/api/v1/store/retention", json={"run": "a", "keep_s": DAY})
    assert (
        put.json()
        == {"keep_s": None, "runs": [{"run": "a", "keep_s": DAY}]}
        == client.get("/api/v1/store/retention").json()
    )
    assert client.get("/api/v1/store/compact").json() == {"status": "idle"}
    assert client.post("/api/v1/store/compact").status_code == 202
    deadline = time.monotonic() + 60
    while (said := client.get("/api/v1/store/compact").json())[
        "status"
    ] == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert said["status"] == "done"
    assert said["removed"]["samples"] == 2
    deleted = client.delete("/api/v1/runs/b")
    assert deleted.status_code == 200
    assert deleted.json()["removed"]["samples"] == 2
    assert client.delete("/api/v1/runs/b").status_code == 404
    assert client.get("/api/v1/runs/b").status_code == 404
    assert [run["run"] for run in client.get("/api/v1/runs").json()["runs"]] == ["a"]


@pytest.mark.parametrize(
    ("body", "status"),
    [({"keep_s": 0}, 400), ({"keep_s": -1}, 400), ({"keep_s": "x"}, 400), ({"keep_s": 5, "run": "none"}, 404)],
)
def test_a_rule_that_cannot_be_is_refused(client: TestClient, body: dict[str, Any], status: int) -> None:
    reply = client.put("/api/v1/store/retention", json=body)
    assert reply.status_code == status
    assert set(reply.json()) == {"error", "hint"}
    assert client.get("/api/v1/store/retention").json() == {"keep_s": None, "runs": []}


def test_nobody_without_the_token_deletes(client: TestClient) -> None:
    client.post("/api/v1/runs", json={"run": "a"})
    for method, path in (("DELETE", "/api/v1/runs/a"), ("POST", "/api/v1/store/compact")):
        assert client.request(method, path, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.request(method, path, headers={"origin": "http://elsewhere"}).status_code == 403
    assert client.get("/api/v1/runs/a").status_code == 200
