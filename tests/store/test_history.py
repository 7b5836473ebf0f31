"""Judging a run again costs what is new; the answer is that of everything read anew, in whatever pieces it came."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.store import query as reading
from lens.store.errors import StoreError
from lens.store.folder import DataFolder
from lens.store.history import Arrivals, ForgottenError, Histories, History, Update
from lens.store.query import Query
from lens.store.readback import without_closed
from lens.store.worker import DiagnosisWorker
from lens.tables import SCHEMA, Tables

from .helpers import SECOND, START, decoded, record_lists, rows_of, sample, send, step_span


def training(steps: range, ranks: int = 2) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in steps:
        for rank in range(ranks):
            t0 = START + step * SECOND
            call = {"type": "span", "kind": "collective", "name": "all_reduce", "rank": rank, "step": step,
                    "t0_ns": t0 + rank, "attrs": {"group": "dp/0", "seq": step}}  # fmt: skip
            records += [step_span(rank, step, 0.5), {**call, "t1_ns": None}, {**call, "t1_ns": t0 + 9}]
            records.append(sample("train.loss", 2.0, step, rank=rank))
    return records


@settings(max_examples=60, deadline=None)
@given(record_lists, st.integers(0, 2**32))
def test_columns_grow_to_what_they_are_at_once(records: list[dict[str, Any]], seed: int) -> None:
    shuffled, order = list(records), random.Random(seed)
    order.shuffle(shuffled)
    history = History()
    while shuffled:
        taken = order.randint(1, len(shuffled))
        history.append(decoded(shuffled[:taken]).tables)
        del shuffled[:taken]
    whole = decoded(records).tables
    whole.strings[:] = whole.strings
    for name in SCHEMA:
        setattr(whole, name, without_closed(name, whole.table(name)))
    assert rows_of(history.tables()) == rows_of(whole)


def test_judging_again_reads_nothing_and_says_the_same(folder: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = reading.read_tables

    def counted(*arguments: Any, **options: Any) -> Tables:
        reads.append(1)
        return read(*arguments, **options)

    monkeypatch.setattr(reading, "read_tables", counted)
    folder.describe_run({"run": "r", "world_size": 2})
    query = Query(folder)
    for start in range(0, 60, 20):
        send(folder, "r", training(range(start, start + 20)))
        grown = query.verdict("r")
        assert grown[0]["upto_step"] == start + 19
        assert reads == [], "a run that began under these eyes is never read"
    anew = Query(folder)
    folder.arrivals.drop(folder.registry.run("r").number)
    assert anew.verdict("r") == grown
    assert len(reads) == 1
    send(folder, "r", training(range(60, 70)))
    later = anew.verdict("r")
    assert len(reads) == 1, "read once, then grown"
    folder.arrivals.drop(folder.registry.run("r").number)
    assert Query(folder).verdict("r") == later


def test_a_run_from_before_a_restart_is_read_once(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "data")
    folder.describe_run({"run": "r", "world_size": 2})
    send(folder, "r", training(range(20)))
    before = Query(folder).verdict("r")
    folder.close()
    folder = DataFolder(tmp_path / "data")
    query = Query(folder)
    assert query.verdict("r") == before
    send(folder, "r", training(range(20, 30)))
    assert query.diagnosis("r")["upto_step"] == 29
    folder.close()


@pytest.mark.processes
def test_a_judging_process_that_died_or_forgot_is_told_everything_again(folder: DataFolder) -> None:
    worker = DiagnosisWorker()
    query = Query(folder, worker.evaluate)
    folder.describe_run({"run": "r", "world_size": 2})
    try:
        send(folder, "r", training(range(10)))
        assert query.diagnosis("r")["upto_step"] == 9
        worker.close()
        send(folder, "r", training(range(10, 20)))
        assert query.diagnosis("r")["upto_step"] == 19
        send(folder, "r", training(range(20, 30)))
        assert query.diagnosis("r") == Query(folder).diagnosis("r")
    finally:
        worker.close()


def test_a_judgement_that_fails_breaks_no_later_one(folder: DataFolder) -> None:
    histories, fail = Histories(), [True]

    def evaluate(names: Any, run: dict[str, Any], update: Update, upto: int | None) -> list[dict[str, Any]]:
        if fail.pop() if fail else False:
            raise StoreError("the process died")
        return histories.evaluate(names, run, update, upto)

    query = Query(folder, evaluate)
    folder.describe_run({"run": "r", "world_size": 2})
    send(folder, "r", training(range(10)))
    with pytest.raises(StoreError):
        query.diagnosis("r")
    assert query.diagnosis("r")["upto_step"] == 9


def test_what_waits_and_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lens.store.history.MOST_ARRIVED_BYTES", 30_000)
    arrivals, part = Arrivals(), decoded(training(range(10))).tables
    for number in (1, 2):
        arrivals.begin(number)
    arrivals.add(1, 5, part)
    for end in range(6, 12):
        arrivals.add(2, end, part)
    asked: list[int] = []

    def read() -> tuple[int, Tables]:
        asked.append(1)
        return 11, Tables()

    assert len(arrivals.update(1, read).parts) == 1
    assert asked == []
    assert arrivals.update(2, read).fresh
    assert asked == [1], "the one that took most room is read again"

    histories = Histories(most_bytes=1)
    names = ("diagnose",)
    histories.evaluate(names, {"run": "r"}, Update((1, 1), True, (part,)), None)
    with pytest.raises(ForgottenError):
        histories.evaluate(names, {"run": "r"}, Update((1, 1), False, ()), None)
