"""lens compare reads runs of a server, folders and files alike, and fails a build only for what is surely slower."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from lens.cli.errors import DONE, FAILED, UNUSABLE
from lens.cli.main import main
from lens.store.folder import DataFolder
from tests.cli.conftest import step_of
from tests.store.helpers import send
from tests.store.processes import Server

MS = 1_000_000


def records(slow: int) -> list[dict[str, Any]]:
    """Forty steps of two ranks; rank 1 computes `slow` ms longer, in steps that differ a little."""
    made, at = [], 1_700_000_000_000 * MS
    for step in range(40):
        length = 100 + slow + step % 4
        for rank in range(2):
            made += step_of(rank, step, at, 40 + step % 4 + slow * rank, length)
        at += length * MS
    return made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = DataFolder(tmp_path / "lens-data")
    for name, slow in (("good", 0), ("slow", 30)):
        folder.describe_run({"run": name, "world_size": 2, "groups": {"dp": [[0, 1]]}})
        send(folder, name, records(slow))
    folder.close()
    return tmp_path / "lens-data"


@pytest.mark.parametrize("served", [False, True], ids=["folder", "server"])
def test_runs_and_files_give_the_same_answer(
    served: bool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "slow.ndjson"
    about = {"type": "run", "run": "slow", "world_size": 2, "groups": {"dp": [[0, 1]]}}
    file.write_text("".join(json.dumps(each) + "\n" for each in [about, *records(30)]))
    replies = []
    with Server(data) if served else contextlib.nullcontext():
        for b in ("slow", str(file)):
            assert main(["compare", "good", b, "--data", str(data), "--json"]) == DONE
            replies.append(json.loads(capsys.readouterr().out))
    assert replies[0] == replies[1]
    assert replies[0]["verdict"] == "slower"
    first = replies[0]["changes"][0]
    assert (first["kind"], first["name"], first["ranks"]) == ("phase", "forward", [1])


def test_a_regression_fails_after_its_evidence_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = tmp_path / "evidence.json"
    words = ["compare", "good", "slow", "--data", str(data), "--evidence", str(evidence)]
    assert main([*words, "--max-regression-pct", "10"]) == FAILED
    assert "FAILED" in capsys.readouterr().out
    assert json.loads(evidence.read_text())["failed"] is True
    assert main([*words, "--max-regression-pct", "50"]) == DONE
    assert main(["compare", "good", "good", "--data", str(data), "--max-regression-pct", "0"]) == DONE
    assert "no difference" in capsys.readouterr().out


def test_what_cannot_be_compared_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "good", "nobody", "--data", str(data)]) == UNUSABLE
    assert "nobody" in capsys.readouterr().err
    assert main(["compare", "good", str(tmp_path / "none.ndjson"), "--data", str(data)]) == UNUSABLE
