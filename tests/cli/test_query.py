"""lens query prints what the store answers, with a server or without, and says why when it does not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens.cli.errors import DONE, UNUSABLE
from lens.cli.main import main
from lens.store.folder import DataFolder
from tests.store.helpers import send, step_span
from tests.store.processes import Server


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    folder = DataFolder(tmp_path / "lens-data")
    folder.describe_run({"run": "mine", "world_size": 2})
    send(folder, "mine", [step_span(rank, step, 0.5) for rank in (0, 1) for step in range(3)])
    folder.close()
    return tmp_path / "lens-data"


@pytest.mark.parametrize("served", [False, True], ids=["folder", "server"])
def test_rows_come_as_table_csv_and_json(served: bool, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["query", "SELECT rank, tokens, attrs FROM steps ORDER BY rank LIMIT 2", "--run", "latest"]
    with Server(data) if served else contextlib.nullcontext():
        assert main(words) == DONE
        assert capsys.readouterr().out.split("\n")[2].split() == ["0", "n/a", "n/a"]
        assert main([*words, "--csv"]) == DONE
        assert capsys.readouterr().out == "rank,tokens,attrs\n0,,\n0,,\n"
        assert main([*words, "--json", "--limit", "1"]) == DONE
        reply = json.loads(capsys.readouterr().out)
        assert (reply["rows"], reply["truncated"]) == ([[0, None, None]], True)
        assert main(["query", "DROP TABLE lens.steps", "--json"]) == UNUSABLE
        assert "only SELECT" in json.loads(capsys.readouterr().out)["error"]
