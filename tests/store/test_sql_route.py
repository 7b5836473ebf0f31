"""SQL of users over HTTP, and answers that follow a failed one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from lens.store.decode import ARROW
from lens.store.errors import BadQueryError
from lens.store.folder import DataFolder, Limits
from lens.store.query import Query
from lens.store.sql.guest import SqlLimits

from .helpers import sample, send


def test_an_answer_after_a_failed_one_holds_nothing_of_it(folder: DataFolder) -> None:
    for _ in range(3):
        with pytest.raises(Exception, match="non-zero"):
            folder.store.query("SELECT number, throwIf(number = 300000) FROM numbers(1000000)")
        for _ in range(5):  # whichever session of the pool comes
            assert folder.store.query("SELECT 'x' AS a FROM numbers(3)").column(0).to_pylist() == ["x"] * 3


def test_the_route_answers_in_json_and_arrow_and_explains_what_it_refuses(client: TestClient) -> None:
    client.post("/api/v1/runs", json={"run": "r", "world_size": 1})
    answer = client.post("/api/v1/query", json={"sql": "SELECT run, 0 / 0 AS odd, NULL AS none FROM runs"}).json()
    assert answer.pop("elapsed_s") > 0
    assert answer == {
        "columns": [{"name": "run", "type": "string"}, {"name": "odd", "type": "double"}, {"name": "none", "type": "null"}],
        "rows": [["r", "NaN", None]],
        "truncated": False,
    }  # fmt: skip
    reply = client.post(
        "/api/v1/query", json={"sql": "SELECT run FROM runs", "run": "r"}, headers={"accept": ARROW}
    )
    assert pa.ipc.open_stream(reply.content).read_all().to_pydict() == {"run": ["r"]}
    assert reply.headers["lens-truncated"] == "false"
    for body, status in (
        ({"sql": "DROP TABLE lens.runs"}, 400),
        ({"sql": 1}, 400),
        ({}, 400),
        ({"sql": "SELECT 1", "limit": 0}, 400),
        ({"sql": "SELECT 1", "run": "nobody"}, 404),
    ):
        refused = client.post("/api/v1/query", json=body)
        assert refused.status_code == status
        assert refused.json().keys() == {"error", "hint"}
    assert client.post("/api/v1/query", content=b"x", headers={"content-type": "text/plain"}).status_code == 415


def test_limits_of_a_folder_reach_its_queries(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path / "data", replace(Limits(), sql=SqlLimits(memory=1 << 20)))
    try:
        folder.describe_run({"run": "r"})
        send(folder, "r", [sample("m", float(step), step, rank=0) for step in range(20_000)])
        with pytest.raises(BadQueryError, match="memory"):
            Query(folder).sql("SELECT groupArray(value), groupArray(t_ns), groupArray(labels) FROM samples")
    finally:
        folder.close()
