"""A run cannot have more series than fit: what goes beyond is refused by name, after a restart too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lens.store.folder import DataFolder, Limits
from lens.store.query import Query

from .helpers import sample, send, step_span


def rows(folder: DataFolder) -> dict[str, int]:
    table = Query(folder).sql("SELECT metric, count() FROM samples GROUP BY metric").table
    return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))


def test_series_beyond_the_limit_are_refused_and_cost_no_other_record(tmp_path: Path) -> None:
    limits = replace(Limits(), series=10)
    folder = DataFolder(tmp_path / "data", limits)
    folder.describe_run({"run": "r"})
    assert send(folder, "r", [sample("train.loss", 1.0, step) for step in range(50)]).rejected == []
    folder.settle()
    runaway = [sample("request", 1.0, step, labels={"id": str(step)}) for step in range(30)]
    receipt = send(folder, "r", [*runaway, sample("train.loss", 2.0, 50), step_span(0, 50)])
    assert (receipt.accepted, receipt.rejected_count) == (11, 21)
    assert "labels must repeat" in receipt.rejected[0]["reason"]
    assert '"id"' in receipt.rejected[0]["reason"]
    folder.settle()
    assert send(folder, "r", [sample("train.loss", 3.0, 51), sample("another", 1.0)]).rejected_count == 1
    folder.settle()
    assert rows(folder) == {"train.loss": 52, "request": 9}
    assert Query(folder).run("r")["drops"]["rejected"] == 22
    folder.close()


def test_what_was_refused_stays_refused_when_the_log_is_taken_again(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "data", replace(Limits(), series=5))
    folder.describe_run({"run": "r"})
    folder.applier.stop()  # nothing reaches the database any more, as if the process had been killed
    records = [sample("request", 1.0, step, labels={"id": str(step)}) for step in range(20)]
    assert send(folder, "r", records, "me", 1).rejected_count == 15
    folder.close()
    folder = DataFolder(tmp_path / "data")
    folder.settle()
    assert rows(folder) == {"request": 5}
    folder.close()
