"""The rings of a crashed or hung run tell what each rank was in, who never came, and whom to look at first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lens.cli.main import main
from lens.cli.waiting import SILENT, suspects, waits

ROOT = Path(__file__).resolve().parents[2]
TRAINING = """
import sys, time
import torch
import torch.distributed as dist
import lens

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3)
pairs = [dist.new_group([0, 1]), dist.new_group([1, 2])]
lens.watch(run="crashed", groups={"dp": [[0, 1]], "ep": [[1, 2]]})
for number in range(10):
    with lens.step(number):
        with lens.phase("forward"):
            dist.all_reduce(torch.ones(8))
            if number == 6 and rank == 1:
                time.sleep(600)
        with lens.phase("backward"):
            if rank < 2:
                dist.all_reduce(torch.ones(4), group=pairs[0])
        with lens.phase("optimizer"):
            dist.all_reduce(torch.ones(2))
"""


@pytest.fixture
def training(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Three ranks that train together; rank 1 falls asleep in the forward of step 6."""
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LENS_AGENT": "0", "LENS_RINGS": str(tmp_path / "rings")}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "meet")],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(3)
    ]
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.wait()


def postmortem(rings: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["postmortem", str(rings), "--json"]) == 0
    reply: dict[str, Any] = json.loads(capsys.readouterr().out)
    return reply


@pytest.mark.processes
def test_a_hung_run_and_then_a_killed_one_tell_who_never_came(
    training: list[subprocess.Popen[bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rings = tmp_path / "rings"

    def everybody_waits() -> bool:
        if len(list(rings.rglob("main.ring"))) != 3:
            return False
        reply = postmortem(rings, capsys)
        # In any step one may wait for another for a moment: it is the seventh from which nobody comes back.
        if [rank["step"] for rank in reply["ranks"]] != [6, 6, 6]:
            return False
        left = [rank["collective"]["left"] for rank in reply["ranks"]]
        return left == [False, True, False] and [len(wait["inside"]) for wait in reply["waits"]] == [1, 1]

    end = time.monotonic() + 120
    while not everybody_waits():
        assert time.monotonic() < end
        assert all(rank.poll() is None for rank in training)
        time.sleep(0.3)
    assert {rank["ended"] for rank in postmortem(rings, capsys)["ranks"]} == {"still runs"}

    # All at once, as the kernel does: none is to see the connection of another go before its own turn comes.
    for rank in training:
        rank.send_signal(signal.SIGSTOP)
    for rank in training:
        os.waitid(os.P_PID, rank.pid, os.WSTOPPED | os.WNOWAIT)
    for rank in training:
        rank.send_signal(signal.SIGKILL)
    for rank in training:
        rank.wait()
    reply = postmortem(rings, capsys)
    assert reply["first"]["ranks"] == [1]
    assert [(rank["step"], rank["phase"]) for rank in reply["ranks"]] == [
        (6, "backward"), (6, "forward"), (6, "optimizer")
    ]  # fmt: skip
    last = [(rank["collective"]["group"], rank["collective"]["seq"]) for rank in reply["ranks"]]
    # Two of all ranks in each of six steps, one of the pair, and the first of step 6.
    world = reply["ranks"][1]["entered"]["world/0"]
    pair = reply["ranks"][1]["entered"]["dp/0"]
    assert last == [("dp/0", pair + 1), ("world/0", world), ("world/0", world + 1)]
    assert [rank["collective"]["left"] for rank in reply["ranks"]] == [False, True, False]
    assert [rank["ended"] for rank in reply["ranks"]] == [SILENT] * 3
    assert sorted((wait["group"], wait["inside"], wait["absent"]) for wait in reply["waits"]) == [
        ("dp/0", [0], [1]), ("world/0", [2], [0, 1])
    ]  # fmt: skip

    assert main(["postmortem", str(rings)]) == 0
    text = capsys.readouterr().out
    assert "look first at rank 1: ranks 0, 2 waited for what it never entered" in text
    assert f"rank 2 inside all_reduce of world/0 number {world + 1}; never entered by ranks 0, 1" in text


def rank_in(number: int, group: str, seq: int, *, left: bool = False, op: str = "all_reduce", **more: Any) -> Any:
    call = {"name": op, "group": group, "seq": seq, "left": left}
    end = {"error": None, "error_ns": None, "ended": SILENT, "seen_ns": 100, "host": "host0"}
    return {"rank": number, "collective": call, "entered": {group: seq}, **end, **more}


GROUPS = {"dp": [[0, 1]]}
CASES = {
    "the one outside any collective": ([rank_in(0, "dp/0", 5), rank_in(1, "dp/0", 4, left=True)], 2, [1], "waited"),
    "the one that could not speak": (
        [rank_in(0, "dp/0", 5, error="RuntimeError: closed"), rank_in(1, "dp/0", 5)], 2, [1], "still report"),
    "nobody, when the links failed": ([rank_in(0, "dp/0", 5), rank_in(1, "dp/0", 5)], 2, [0, 1], "never left"),
    "those that mixed up operations": (
        [rank_in(0, "dp/0", 5), rank_in(1, "dp/0", 5, op="broadcast")], 2, [0, 1], "different operations"),
    "the one without a ring": ([rank_in(0, "world/0", 5)], 2, [1], "left no ring"),
    "a circle": (
        [rank_in(0, "dp/0", 5, entered={"dp/0": 5, "world/0": 1}),
         rank_in(1, "world/0", 2, entered={"dp/0": 4, "world/0": 2})], 2, [0, 1], "each waited"),
    "the one on its way out": (
        [rank_in(0, "dp/0", 6), rank_in(1, "dp/0", 5)], 2, [1], "never entered"),
    "the silent one, not one that the launcher ended": (
        [rank_in(0, "dp/0", 5), rank_in(1, "dp/0", 4, left=True, error="RuntimeError: worker", error_ns=200,
         ended="ended with an error"), rank_in(2, "dp/1", 4, left=True)], 3, [2], "fell silent"),
    "the one with an error, not one ended after it": (
        [rank_in(0, "dp/0", 5), rank_in(1, "dp/0", 4, left=True, error="ValueError: own", error_ns=200,
         ended="ended with an error"), rank_in(2, "dp/1", 4, left=True, seen_ns=300)], 3, [1], "waited"),
    "of two that others wait for, the silent one": (
        [rank_in(0, "world/0", 5), rank_in(1, "world/0", 4, left=True), rank_in(2, "world/0", 4, left=True, error="E",
         error_ns=200, ended="ended with an error")], 3, [1], "waited"),
    "two of a pair": (
        [rank_in(0, "pp/0:0-1", 3, op="send"), rank_in(1, "pp/0:0-1", 2, op="recv", left=True)], 2, [1], "waited"),
}  # fmt: skip


@pytest.mark.parametrize(("ranks", "size", "named", "because"), CASES.values(), ids=list(CASES))
def test_whom_to_look_at_first(ranks: list[Any], size: int, named: list[int], because: str) -> None:
    found = suspects(ranks, waits(ranks, GROUPS, size))
    assert found is not None
    assert (list(found.ranks), because in found.because) == (named, True), found


def test_nobody_is_named_when_nobody_waits() -> None:
    ranks = [rank_in(rank, "dp/0", 5, left=True) for rank in range(2)]
    assert suspects(ranks, waits(ranks, GROUPS, 2)) is None


def test_a_folder_without_rings_says_where_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["postmortem", str(tmp_path)]) == 2
    assert "DATA/rings/RUN" in capsys.readouterr().err
