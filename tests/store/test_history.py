"""Judging a run again costs what is new; the answer is that of everything read anew, in whatever pieces it came."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens.slots import NULL
from lens.store import judgements as reading
from lens.store.errors import StoreError
from lens.store.folder import DataFolder
from lens.store.history import Arrivals, ForgottenError, Histories, History, Update
from lens.store.query import Query
from lens.store.readback import without_closed
from lens.store.worker import DiagnosisWorker
from lens.tables import SCHEMA, Begin, Tables

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


FEW = 1200
"""Records that a run of this file is judged by, in place of millions."""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long runs begin at some hundred records."""
    monkeypatch.setattr(reading, "MOST_OF_RUN", FEW)


def judged(folder: DataFolder) -> Query:
    return Query(folder, Histories(most_of_run=FEW).evaluate)


def first_missing(reply: dict[str, Any]) -> int:
    """The step before which a reply says to know nothing; 0 where it says no such thing."""
    told = [name for name in reply["coverage"]["signals_missing"] if name.startswith("steps before ")]
    return int(told[0].removeprefix("steps before ")) if told else 0


def test_a_long_run_is_judged_by_its_newest_steps(folder: DataFolder, few: None) -> None:
    folder.describe_run({"run": "r", "world_size": 2})
    query, sizes = judged(folder), []
    for start in range(0, 600, 50):
        send(folder, "r", training(range(start, start + 50)))
        diagnosis, ledger = query.verdict("r")
        assert diagnosis["upto_step"] == start + 49
        assert diagnosis["status"] == "healthy"
        sizes.append(start + 50 - first_missing(diagnosis))
        assert ledger["to_step"] == start + 49
        assert ledger["from_step"] == first_missing(diagnosis)
    assert sizes[0] == 50, "a short run is judged whole"
    # Six records a step; of more than `FEW` the newest half stays, but never fewer steps than 64.
    assert all(64 <= size <= FEW / 6 for size in sizes[1:])
    assert max(sizes) < 600
    begun = first_missing(judged(folder).diagnosis("r"))
    assert 400 <= begun <= 600 - 64, "a server that was restarted reads no more than that"


def test_the_past_of_a_long_run_is_read_when_it_is_asked_for(folder: DataFolder, few: None) -> None:
    folder.describe_run({"run": "r", "world_size": 2})
    query = judged(folder)
    for start in range(0, 600, 150):
        send(folder, "r", training(range(start, start + 150)))
        query.verdict("r")
    now = query.diagnosis("r")
    for upto in (5, 130, 301, 540, 599):
        then = query.diagnosis("r", upto)
        assert then["upto_step"] == upto
        assert then["status"] == ("healthy" if upto > 10 else "insufficient")
        assert upto - 250 <= first_missing(then) <= max(0, upto - 63)
    assert query.diagnosis("r") == now


def test_late_records_of_steps_left_out_are_left_out_too() -> None:
    history = History()
    history.append(decoded(training(range(400))).tables)
    shorter = history.shortened(900)
    before = shorter.count
    shorter.append(decoded(training(range(3))).tables)
    assert shorter.count == before
    shorter.append(decoded(training(range(400, 401))).tables)
    assert shorter.count > before
    assert shorter.begin is not None
    assert shorter.tables().steps["step"].min() == shorter.begin.step


@settings(max_examples=60, deadline=None)
@given(record_lists, st.integers(-3, 40))
def test_records_since_a_step_keep_their_values(records: list[dict[str, Any]], step: int) -> None:
    whole = decoded(records).tables
    later = whole.since(Begin(step, START))
    kept = [row for row, number in enumerate(whole.vectors["step"]) if number != NULL and number >= step]
    named = [row for row, number in enumerate(later.vectors["step"].tolist()) if number != NULL]
    assert [later.values_of(row).tobytes() for row in named] == [whole.values_of(row).tobytes() for row in kept]
    assert len(later.vector_values) == later.vectors["length"].sum()


def test_what_waits_and_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lens.store.history.MOST_ARRIVED_BYTES", 30_000)
    arrivals, part = Arrivals(), decoded(training(range(10))).tables
    for number in (1, 2):
        arrivals.begin(number)
    arrivals.add(1, 5, part)
    for end in range(6, 12):
        arrivals.add(2, end, part)
    asked: list[int] = []

    def read() -> tuple[int, Tables, None]:
        asked.append(1)
        return 11, Tables(), None

    assert len(arrivals.update(1, read).parts) == 1
    assert asked == []
    assert arrivals.update(2, read).fresh
    assert asked == [1], "the one that took most room is read again"

    histories = Histories(most_bytes=1)
    names = ("diagnose",)
    histories.evaluate(names, {"run": "r"}, Update((1, 1), True, (part,)), None)
    with pytest.raises(ForgottenError):
        histories.evaluate(names, {"run": "r"}, Update((1, 1), False, ()), None)
