"""The rings of a crashed run tell what each rank was in, and who never came."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lens.cli.main import main

RANK = """
import os, signal, sys
from pathlib import Path
from lens.recorder import Recorder
from lens.settings import Settings
rank, seq = int(sys.argv[2]), int(sys.argv[3])
recorder = Recorder.create(
    Settings.load({}, rings=Path(sys.argv[1]), run="crashed", host="host0", ring_mib=1), {"rank": rank}
)
ids = recorder.intern("all_reduce") | recorder.intern("dp/0") << 32
for number in range(seq):
    recorder.enter_step(number, 10)
    recorder.enter_collective(ids, 20, number, 64, number)
    recorder.collective(ids, 20, 30, number, number, 64)
    recorder.step(number, 10, 40)
recorder.enter_step(seq, 50)
if rank != 1:
    recorder.enter_collective(ids, 60, seq, 64, seq)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def rings(tmp_path: Path) -> Path:
    for rank in range(3):
        subprocess.run([sys.executable, "-c", RANK, str(tmp_path / "rings"), str(rank), "7"], check=False)
    return tmp_path / "rings"


@pytest.mark.processes
def test_the_last_collective_of_each_rank_and_who_never_entered_it(
    rings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["postmortem", str(rings), "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert [rank["collective"]["seq"] for rank in reply["ranks"]] == [7, 6, 7]
    assert [rank["collective"]["left"] for rank in reply["ranks"]] == [False, True, False]
    assert reply["missing"] == [{"group": "dp/0", "seq": 7, "ranks": [1]}]
    assert all(rank["ended"] == "without a farewell" for rank in reply["ranks"])
    assert main(["postmortem", str(rings)]) == 0
    assert "never entered number 7 of dp/0: rank 1" in capsys.readouterr().out


def test_a_folder_without_rings_says_where_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["postmortem", str(tmp_path)]) == 2
    assert "DATA/rings/RUN" in capsys.readouterr().err
