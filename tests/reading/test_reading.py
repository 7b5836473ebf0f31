"""lens.open: the same rows with a server or without, in Arrow, pandas and plain Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import lens
from lens.reading import ReadingError, StoredRun
from lens.store.folder import DataFolder
from tests.store.helpers import START, sample, send, step_span
from tests.store.processes import Server


@pytest.fixture(params=["folder", "server"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoredRun]:
    folder = DataFolder(tmp_path / "data")
    for name in ("first", "second"):
        folder.describe_run({"run": name, "world_size": 2})
    records = [sample("train.loss", 3.0 - step / 10, step, rank=0) for step in range(20)]
    records += [sample("hw.power", "NaN", host="h", device="h/gpu0", labels={"hw.type": "gpu"}, t_ns=START)]
    send(folder, "first", [*records, *(step_span(rank, step, 0.5) for rank in (0, 1) for step in range(20))])
    folder.close()
    with (
        Server(tmp_path / "data") if request.param == "server" else contextlib.nullcontext(),
        lens.open("fir", data=tmp_path / "data") as opened,
    ):
        yield opened


def test_a_series_is_every_sample_with_absent_values_absent(run: StoredRun) -> None:
    frame = run.series("train.loss").pandas()
    assert list(frame["step"]) == list(range(20))
    assert frame["value"].iloc[-1] == pytest.approx(1.1)
    assert str(frame["step"].dtype) == "Int64"
    assert frame["host"].isna().all()
    (power,) = run.series("hw.power").dicts()
    assert (power["rank"], power["step"], power["labels"]) == (None, None, {"hw.type": "gpu"})
    assert power["value"] != power["value"], "NaN stays NaN"
    assert [row["step"] for row in run.series("train.loss", first=5, last=6)] == [5, 6]
    assert len(run.series("nobody.sent.this")) == 0
    assert run.series("nobody.sent.this").arrow().schema == run.series("train.loss").arrow().schema


def test_metrics_that_steps_hold_are_series_too(run: StoredRun) -> None:
    durations = run.series("step.duration").arrow()
    assert durations.num_rows == 40
    assert set(durations.column("value").to_pylist()) == {0.5}
    assert {"train.loss", "step.duration"} <= set(run.metrics())


def test_tables_sql_verdict_and_files(run: StoredRun, tmp_path: Path) -> None:
    assert pa.table(run.table("steps", first=19)).num_rows == 2, "anything that knows Arrow takes the rows"
    assert run.sql("SELECT rank, count() AS n FROM steps GROUP BY rank ORDER BY rank").dicts() == [
        {"rank": 0, "n": 20},
        {"rank": 1, "n": 20},
    ]
    assert run.diagnosis()["run"] == run.about()["run"] == "first"
    assert run.export(tmp_path / "steps.csv", "csv", "steps").read_text().count("\n") == 41


def test_what_cannot_be_read_says_what_to_do(run: StoredRun, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="only SELECT"):
        run.sql("DROP TABLE lens.steps").arrow()
    with pytest.raises(ReadingError, match="no data folder"):
        lens.open(data=tmp_path / "none")


def test_nobody_at_the_address_is_said(tmp_path: Path) -> None:
    with pytest.raises(ReadingError, match="does not answer") as error:
        lens.open(server="http://127.0.0.1:9", token="x", data=tmp_path)
    assert "lens serve" in error.value.hint
