"""The same steps of all ranks are profiled from outside; and of ranks that then hang, each is found where it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lens.attach.windows import first_step
from tests.hooks.ringside import script_of
from tests.waiting import wait_for

pytestmark = pytest.mark.processes

RANKS = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path

dist.init_process_group("gloo")
torch.manual_seed(0)
folder = Path(sys.argv[1])
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
backward = torch.autograd.backward

def fetch():
    while dist.get_rank() == 1 and (folder / "hang").exists():
        time.sleep(0.05)
    return torch.randn(4, 16)

def train():
    ends = torch.zeros(1)
    while not ends:
        batch = fetch()
        ends = torch.tensor([float((folder / "stop").exists())])
        dist.all_reduce(ends)
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.01)

(folder / f"ready{dist.get_rank()}").touch()
train()
same = torch.autograd.backward is backward and not torch.autograd._profiler_enabled()
sys.stdout.write(f"as it was {same}\\n")
dist.destroy_process_group()
"""


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(RANKS.splitlines(), 1) if text in line)


def lens(folder: Path, *words: str) -> dict[str, Any]:
    environment = {**os.environ, "LENS_RINGS": str(folder / "rings"), "LENS_DATA": str(folder / "data")}
    found = subprocess.run(
        [sys.executable, "-m", "lens", *words, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=150,
    )
    assert found.stdout, found.stderr
    reply: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return reply


def profiled_steps(trace: Path) -> set[int]:
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    return {int(found[1]) for name in names if (found := re.fullmatch(r"ProfilerStep#(\d+)", name))}


def test_all_ranks_are_profiled_at_once_and_found_where_they_hang(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(script_of(RANKS))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists())
    try:
        launcher = ("--all-ranks", str(process.pid))
        # A rank that is told of a step only when the step is over refuses it, and says so: then it is asked again.
        traces = wait_for(lambda: profiled(tmp_path, launcher))
        assert [one["rank"] for one in traces] == [0, 1], traces
        first = traces[0]["first"]
        for one in traces:
            assert (one["first"], one["last"]) == (first, first + 1)
            assert profiled_steps(Path(one["path"])) == {first, first + 1}
        assert "none of these processes is watched" in lens(tmp_path, "detach", *launcher)["error"]
        # Rank 1 waits for its batch, and rank 0 for rank 1 in a collective.
        (tmp_path / "hang").touch()
        reduces, sleeps = line_of("dist.all_reduce"), line_of("time.sleep(0.05)")
        where = {0: f"all_reduce at ranks.py:{reduces} in train", 1: f"ranks.py:{sleeps} in fetch"}
        wait_for(lambda: standing(tmp_path, launcher) == where)
        (tmp_path / "hang").unlink()
        (tmp_path / "stop").touch()
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert said.splitlines() == ["as it was True"] * 2
    finally:
        process.terminate()
        process.communicate(timeout=60)


def profiled(folder: Path, launcher: tuple[str, ...]) -> list[dict[str, Any]]:
    """What came of a window over two steps; nothing where a rank has no trace of it."""
    traces: list[dict[str, Any]] = lens(folder, "attach", "--profile", "2", *launcher, "--wait", "60").get(
        "traces", []
    )
    return traces if all(one["path"] for one in traces) else []


def standing(folder: Path, launcher: tuple[str, ...]) -> dict[int, str]:
    groups = lens(folder, "attach", "--stacks", *launcher)["groups"]
    return {rank: group["where"] for group in groups for rank in group["ranks"]}


def test_a_window_begins_where_no_rank_has_been_yet() -> None:
    assert first_step([100, 103], 0.1) == 103 + 3 + 20
    assert first_step([7], 30.0) == 7 + 3 + 1
