"""An unprepared training: attached to, seen, left; the same numbers and the same names as if nobody had looked."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lens.ring_reader import RingError, RingReader
from lens.slots import COLLECTIVE, PHASE, STEP, iter_records
from tests.hooks.ringside import script_of
from tests.waiting import wait_for

pytestmark = pytest.mark.processes
PACE_S = 0.01
"""Pause after each step while somebody attaches: the training must outlast that, however slow the machine is."""
TRAINING = """
import sys, time, torch
from pathlib import Path
from torch.optim import optimizer as optimizers

def names():
    return [
        torch.autograd.backward, torch.nn.Module.__call__, torch.nn.Linear.forward, sys.excepthook,
        torch.utils.data.dataloader._BaseDataLoaderIter.__next__, torch.optim.Optimizer.__init__,
        len(optimizers._global_optimizer_pre_hooks), len(optimizers._global_optimizer_post_hooks),
    ]

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizers.register_optimizer_step_post_hook(lambda *_: None)  # the program's own, before ours
before, forwards = names(), [module.forward for module in model.modules()]
loader = torch.utils.data.DataLoader(torch.randn(100_000, 16), batch_size=4)
stop = Path(sys.argv[1])
steps, pace = int(sys.argv[2]), float(sys.argv[3])
for step, batch in enumerate(loader):
    loss = model(batch).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item().hex(), flush=True)
    time.sleep(pace)
    if stop.exists() or step + 1 == steps:
        break
same = before == names() and forwards == [module.forward for module in model.modules()]
print("same names" if same else f"CHANGED {before} {names()}", flush=True)
"""


class Training:
    """The training in a process of its own, and `lens` beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ, "LENS_RINGS": str(folder / "rings"), "LENS_DATA": str(folder / "data"), "LENS_AGENT": "0",
            "LENS_HOST": "host0",
        }  # fmt: skip
        self.stop = folder / "stop"

    def start(self, steps: int, pace_s: float, program: str = TRAINING) -> subprocess.Popen[str]:
        script = self.folder / "train.py"
        script.write_text(program)
        return subprocess.Popen(
            [sys.executable, str(script), str(self.stop), str(steps), str(pace_s)],
            stdout=(self.folder / "out").open("w"), stderr=subprocess.PIPE, text=True, env=self.environment,
        )  # fmt: skip

    def lines(self) -> list[str]:
        return (self.folder / "out").read_text().splitlines()

    def lens(self, *words: str) -> dict[str, Any]:
        """What `lens` says. A thread that could not be stopped within a second is as it was, and is asked again."""
        for _ in range(10):
            reply = self._lens(*words)
            if not any("did not stop within" in one.get("text", "") for one in reply.get("processes", ())):
                break
        return reply

    def _lens(self, *words: str) -> dict[str, Any]:
        found = subprocess.run(
            [sys.executable, "-m", "lens", *words, "--json"],
            capture_output=True, text=True, env=self.environment, timeout=200,
        )  # fmt: skip
        assert found.stdout, found.stderr
        reply: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
        return reply


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def recorded(ring: Path) -> tuple[list[int], set[str]]:
    """Steps and phases of a ring."""
    reader = RingReader(ring)
    steps, phases = [], set()
    while (part := reader.poll()) is not None:
        for record in iter_records(part):
            if record["type"] == STEP:
                steps.append(record["step"])
            elif record["type"] == PHASE:
                phases.add(record["name"])
    return steps, phases


def test_a_training_is_seen_left_and_seen_again_and_computes_what_it_would_have(
    training: Training, tmp_path: Path
) -> None:
    process = training.start(100_000, PACE_S)
    wait_for(lambda: len(training.lines()) > 20)
    # A server of a name nobody has: records stay in the ring, and no agent is started.
    attach = ("attach", str(process.pid), "--server", "http://127.0.0.1:9", "--wait", "60")
    for _ in range(2):
        reply = training.lens(*attach)
        (found,) = reply["processes"]
        assert found["state"] == "watching", found
        ring = Path(found["ring"])
        seen = len(training.lines())
        wait_for(lambda seen=seen: len(training.lines()) > seen + 30)
        steps, phases = recorded(ring)
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        assert len(steps) >= 20
        assert {"data", "forward", "backward", "optimizer"} <= phases
        assert training.lens(*attach)["processes"][0]["state"] == "already"
        left = training.lens("detach", str(process.pid), "--wait", "60")
        assert left == {"processes": [{"pid": process.pid, "left": True}]}
        seen = len(training.lines())
        wait_for(lambda seen=seen: len(training.lines()) > seen + 10)
    training.stop.touch()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.count("lens: attached by") == 2
    watched = training.lines()
    assert watched[-1] == "same names"
    training.stop.unlink()
    training.start(len(watched) - 1, 0).communicate(timeout=200)
    assert training.lines() == watched


RANKS = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
kernels = torch._C._dispatch_dump("c10d::allreduce_")
stop = Path(sys.argv[1])
ends, steps = torch.zeros(1), 0
while not ends:
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    ends = torch.tensor([float(stop.exists())])
    dist.all_reduce(ends)
    steps += 1
    if steps == 10:  # the reducer has its buckets, and what is compared at the end has been read
        (stop.parent / f"ready{dist.get_rank()}").touch()
    time.sleep(0.002)
same = kernels == torch._C._dispatch_dump("c10d::allreduce_")
sys.stdout.write(f"same kernels {same}\\n")  # at once: both ranks write to one pipe
dist.destroy_process_group()
"""


def calls_of(main: Path) -> list[dict[str, Any]]:
    """What the native observer of one process has recorded so far, into the ring that it makes at the first call."""
    calls: list[dict[str, Any]] = []
    for ring in main.parent.glob("native-*.ring"):
        with contextlib.suppress(RingError):  # not written yet
            reader = RingReader(ring)
            while (part := reader.poll()) is not None:
                calls += [record for record in iter_records(part) if record["type"] == COLLECTIVE]
    return calls


def seen_by_both(rings: Path) -> set[int]:
    """Numbers of the collectives that both ranks have recorded."""
    numbers = [{call["seq"] for call in calls_of(main)} for main in rings.glob("*/*/main.ring")]
    return set.intersection(*numbers) if len(numbers) == 2 else set()


@pytest.mark.usefixtures("observer_library")
def test_what_c_plus_plus_sends_is_seen_from_the_attach_on(training: Training, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(script_of(RANKS))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, training.stop],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=training.environment,
    )  # fmt: skip
    rings = training.folder / "rings"
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    assert len(training.lens("attach", "--check", "--all-ranks", str(process.pid))["processes"]) == 2
    words = ("--all-ranks", str(process.pid), "--server", "http://127.0.0.1:9", "--wait", "60")
    reply = training.lens("attach", *words)
    assert {found["state"] for found in reply["processes"]} <= {"watching", "already"}, reply
    wait_for(lambda: len(seen_by_both(rings)) > 20)
    detached = training.lens("detach", "--all-ranks", str(process.pid), "--wait", "60")
    assert [found["left"] for found in detached["processes"]] == [True] * 2
    training.stop.touch()
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert said.splitlines() == ["same kernels True"] * 2
    numbered = []
    for main in rings.glob("*/*/main.ring"):
        assert RingReader(main).about["collectives"] == "native"
        assert len(list(main.parent.glob("native-*.ring"))) == 1
        calls = calls_of(main)
        reduced = {call["bytes"] for call in calls if call["name"] == "all_reduce"}
        assert reduced == {4, (16 + 1) * 3 * 4}  # the reducer's bucket, and what the loop itself sends
        numbers = [call["seq"] for call in calls]
        assert sorted(numbers) == list(range(min(numbers), min(numbers) + len(numbers)))
        numbered.append({call["seq"]: call["bytes"] for call in calls})
    both = numbered[0].keys() & numbered[1].keys()
    assert len(both) > 20
    assert all(numbered[0][number] == numbered[1][number] for number in both)


def test_what_cannot_be_attached_to_is_refused_with_a_fix(training: Training) -> None:
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        try:
            reply = training.lens("attach", str(sleeper.pid))
            assert "is no Python interpreter" in reply["error"]
            assert reply["hint"]
            checked = training.lens("attach", "--check", str(sleeper.pid))["processes"][0]
            assert (checked["can"], checked["refusal"]["rule"]) == (False, "not Python")
        finally:
            sleeper.kill()
    assert "none of these processes is watched" in training.lens("detach", str(os.getpid()))["error"]
