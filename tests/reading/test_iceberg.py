"""A run as Iceberg tables: what pyiceberg, and whoever else reads the warehouse, finds there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lens.cli.main import main
from lens.store.folder import DataFolder
from tests.store.conftest import _close_what_a_failed_test_left_open  # noqa: F401
from tests.store.helpers import START, sample, send, step_span

sql = pytest.importorskip("pyiceberg.catalog.sql")


def filled(data: Path, run: str, steps: int) -> None:
    folder = DataFolder(data)
    folder.describe_run({"run": run})
    event = {"type": "event", "t_ns": START, "kind": "k", "severity": "error", "text": "boo"}
    vector = {"type": "vector", "t_ns": START, "metric": "moe.expert.tokens", "values": [1.0, 2.5], "layer": 1}
    rows = [sample("train.loss", step / 2, step, rank=1, labels={"layer": "3"}) for step in range(steps)]
    send(
        folder,
        run,
        [*rows, sample("hw.power", 300.0, host="h"), *(step_span(0, step) for step in range(steps)), event, vector],
    )
    folder.close()


def test_runs_lie_side_by_side_and_one_written_again_takes_its_place(tmp_path: Path, capsys: Any) -> None:
    data, warehouse = tmp_path / "data", tmp_path / "warehouse"
    filled(data, "one", 5)
    filled(data, "two", 3)
    for run in ("one", "two", "one"):
        assert main(["export", run, "--iceberg", str(warehouse), "--data", str(data), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["rows"] == {"samples": 6, "steps": 5, "spans": 0, "collectives": 0, "vectors": 1, "events": 1}
    catalog = sql.SqlCatalog("lens", uri=f"sqlite:///{warehouse / 'catalog.db'}", warehouse=warehouse.as_uri())
    found = {name: catalog.load_table(("lens", name)).scan().to_arrow() for name in said["rows"]}
    rows = found["samples"].to_pylist(maps_as_pydicts="lossy")
    losses = [
        (row["run"], row["rank"], row["step"], row["labels"], row["value"])
        for row in rows
        if row["metric"] == "train.loss"
    ]
    assert sorted(losses) == sorted(
        (run, 1, step, {"layer": "3"}, step / 2) for run, steps in (("one", 5), ("two", 3)) for step in range(steps)
    )
    power = [row for row in rows if row["metric"] == "hw.power"]
    assert [(row["host"], row["rank"], row["step"]) for row in power] == [("h", None, None)] * 2, (
        "absent stays absent"
    )
    assert found["vectors"].column("values").to_pylist() == [[1.0, 2.5]] * 2
    assert found["events"].column("severity").to_pylist() == ["error"] * 2
    assert (found["steps"].num_rows, found["spans"].num_rows) == (8, 0)


def test_large_tables_come_in_pieces_that_together_are_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lens.reading.iceberg as iceberg
    from lens.store.export import rows as exported

    monkeypatch.setattr(iceberg, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(exported, "BATCH_ROWS", 2)
    monkeypatch.setattr(exported, "ROWS_AT_ONCE", 3)
    data, warehouse = tmp_path / "data", tmp_path / "warehouse"
    filled(data, "one", 9)
    assert main(["export", "one", "--iceberg", str(warehouse), "--data", str(data)]) == 0
    catalog = sql.SqlCatalog("lens", uri=f"sqlite:///{warehouse / 'catalog.db'}", warehouse=warehouse.as_uri())
    steps = catalog.load_table(("lens", "samples")).scan().to_arrow().column("step").to_pylist()
    assert sorted(step for step in steps if step is not None) == list(range(9))
