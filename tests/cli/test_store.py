"""``lens store``: the same words and answers through a server and on a folder that no server owns."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lens.cli.errors import DONE, FAILED, UNUSABLE, CommandError
from lens.cli.store import kept, seconds_of, size_of
from tests.store.processes import Server

from .conftest import sample, step_of

DAY_NS = 86_400 * 10**9
Lens = Callable[..., tuple[int, str]]


def fill(server: Server) -> None:
    """Three runs: one of three days ago, one of now, one of both."""
    now = time.time_ns()
    with server.client() as client:
        for run, ages in (("old", [3 * DAY_NS]), ("new", [0]), ("both", [3 * DAY_NS, 0])):
            assert client.post("/api/v1/runs", json={"run": run}).status_code == 201
            records: list[dict[str, Any]] = []
            for number, age in enumerate(ages):
                records += step_of(0, 1000 * number, now - age, 80)
                records += [
                    sample("hw.power", 100.0, now - age, host="h"),
                    sample("m", 1.0, now - age, step=1000 * number),
                ]
            body = "".join(json.dumps(record) + "\n" for record in records)
            reply = client.post(
                f"/api/v1/runs/{run}/records", content=body, headers={"content-type": "application/x-ndjson"}
            )
            assert reply.json()["rejected"] == []


@pytest.fixture(params=["served", "folder"])
def lens(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lens]:
    """Runs ``lens store WORDS`` on a filled store, which a server owns or nobody; exit code and what was printed."""
    data = tmp_path / "data"

    def run(*words: str, answer: str | None = None) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "lens", "store", *words, "--data", str(data)],
            input=answer,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout + done.stderr

    with Server(data) as server:
        fill(server)
        if request.param == "folder":
            server.stop()
        yield run


def samples_of(lens: Lens) -> dict[str, int]:
    code, text = lens("info", "--json")
    assert code == DONE
    return {run["run"]: run["tables"].get("samples", 0) for run in json.loads(text)["runs"]}


@pytest.mark.processes
def test_info_retention_compact_delete(lens: Lens) -> None:
    assert samples_of(lens) == {"old": 2, "new": 2, "both": 4}
    code, text = lens("info")
    assert code == DONE
    assert "8 samples" in text
    assert "records are kept for ever" in text

    assert lens("retention") == (DONE, "records are kept for ever\n")
    assert lens("retention", "1d") == (DONE, "records are kept for 1d\n")
    code, text = lens("retention", "--off", "--run", "old")
    assert (code, text) == (DONE, "records are kept for 1d\n  those of old: for ever\n")
    code, text = lens("compact")
    assert code == DONE
    assert "parts before" in text
    assert "2 of samples" in text
    assert samples_of(lens) == {"old": 2, "new": 2, "both": 2}
    lens("retention", "--follow", "--run", "old")
    code, text = lens("compact", "--json")
    said = json.loads(text)
    assert said["removed"]["samples"] == 2
    assert said["after"]["bytes"] > 0
    assert samples_of(lens) == {"old": 0, "new": 2, "both": 2}

    code, text = lens("delete", "both", answer="")
    assert code == UNUSABLE
    assert "--yes" in text
    code, text = lens("delete", "bot", "--yes")
    assert code == UNUSABLE
    assert "bot is not a run here" in text
    code, text = lens("delete", "both", "--yes")
    assert code == DONE
    assert "2 of samples" in text
    assert samples_of(lens) == {"old": 0, "new": 2}


@pytest.mark.processes
@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", FAILED, {"a"}), ("y\n", DONE, set())])
def test_deleting_asks_who_sits_there(tmp_path: Path, answer: str, code: int, left: set[str]) -> None:
    from lens.store.folder import DataFolder

    folder = DataFolder(tmp_path)
    folder.describe_run({"run": "a"})
    folder.close()
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lens", "store", "delete", "a", "--data", str(tmp_path)],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(keyboard, answer.encode())
    _, said = process.communicate(timeout=120)
    os.close(keyboard)
    os.close(terminal)
    assert process.returncode == code, said
    assert "Delete a for good" in said
    folder = DataFolder(tmp_path)
    assert {run.id for run in folder.registry.runs()} == left
    folder.close()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["delete"], "takes the id of a run"),
        (["info", "r"], "takes no 'r'"),
        (["compact", "--off"], "belongs to lens store retention"),
        (["token", "bob"], "either --scope or --off"),
        (["token", "bob", "--scope", "read", "--off"], "either --scope or --off"),
        (["token", "--off"], "either --scope or --off"),
        (["token", "--scope", "read"], "belongs to lens store token NAME"),
        (["token", "bob", "--scope", "write"], "ingest, read or admin"),
        (["token", "owner", "--scope", "read"], "is no name"),
        (["token", "bob", "--off"], "bob has no token"),
        (["retention", "1d", "--off"], "exclude each other"),
        (["retention", "--follow"], "takes --run"),
        (["retention", "soon"], "soon is no time"),
    ],
)
def test_words_that_do_not_go_together_are_refused(
    words: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lens.cli.main import main

    assert main(["store", *words, "--data", str(tmp_path)]) == UNUSABLE
    assert problem in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lens.cli.main import main

    assert main(["store", "info", "--data", str(tmp_path / "none")]) == UNUSABLE
    assert "there is no data folder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "seconds", "back"),
    [("90s", 90, "for 90s"), ("60m", 3600, "for 1h"), ("36h", 129_600, "for 36h"), ("2w", 1_209_600, "for 14d")],
)
def test_times(text: str, seconds: int, back: str) -> None:
    assert seconds_of(text) == seconds
    assert kept(seconds) == back


@pytest.mark.parametrize("text", ["", "d", "0d", "-1d", "1.5h", "7", "٣d", "1y"])
def test_no_times(text: str) -> None:
    with pytest.raises(CommandError, match="is no time"):
        seconds_of(text)


def test_sizes() -> None:
    assert [size_of(each) for each in (0, 1023, 1536, 5 * 2**40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]


def test_tokens_are_made_listed_and_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lens.cli.main import main

    def store(*words: str) -> tuple[int, str]:
        code = main(["store", "token", *words, "--data", str(tmp_path)])
        return code, capsys.readouterr().out.strip()

    assert store() == (DONE, "nobody but the owner has a token")
    code, token = store("bob", "--scope", "read,ingest")
    assert code == DONE
    assert len(token) > 40
    assert store() == (DONE, "bob: ingest, read")
    assert store("bob", "--scope", "read")[0] == UNUSABLE
    assert all(token not in path.read_text() for path in tmp_path.iterdir() if path.is_file())
    assert store("bob", "--off")[0] == DONE
    assert json.loads(store("--json")[1]) == {"tokens": []}
    noted = [json.loads(line) for line in (tmp_path / "audit.ndjson").read_text().splitlines()]
    assert [(line["action"], line["name"]) for line in noted] == [("token.added", "bob"), ("token.removed", "bob")]
