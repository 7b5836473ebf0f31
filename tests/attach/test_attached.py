"""An unprepared training: attached to, seen, left; the same numbers and the same names as if nobody had looked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lens.ring_reader import RingReader
from lens.slots import COLLECTIVE, PHASE, STEP, iter_records
from tests.hooks.ringside import script_of

pytestmark = [pytest.mark.processes, pytest.mark.timeout(200)]
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
steps = int(sys.argv[2])
for step, batch in enumerate(loader):
    loss = model(batch).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item().hex(), flush=True)
    time.sleep(0.002)
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

    def start(self, steps: int) -> subprocess.Popen[str]:
        script = self.folder / "train.py"
        script.write_text(TRAINING)
        return subprocess.Popen(
            [sys.executable, str(script), str(self.stop), str(steps)],
            stdout=(self.folder / "out").open("w"), stderr=subprocess.PIPE, text=True, env=self.environment,
        )  # fmt: skip

    def lines(self) -> list[str]:
        return (self.folder / "out").read_text().splitlines()

    def lens(self, *words: str) -> dict[str, Any]:
        found = subprocess.run(
            [sys.executable, "-m", "lens", *words, "--json"],
            capture_output=True, text=True, env=self.environment, timeout=100,
        )  # fmt: skip
        assert found.stdout, found.stderr
        reply: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
        return reply


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def wait_for(condition: Callable[[], Any], patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


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
    process = training.start(100_000)
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
        assert training.lens("detach", str(process.pid)) == {"processes": [{"pid": process.pid, "left": True}]}
        seen = len(training.lines())
        wait_for(lambda seen=seen: len(training.lines()) > seen + 10)
    training.stop.touch()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.count("lens: attached by") == 2
    watched = training.lines()
    assert watched[-1] == "same names"
    training.stop.unlink()
    training.start(len(watched) - 1).communicate(timeout=100)
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
ends = torch.zeros(1)
while not ends:
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    ends = torch.tensor([float(stop.exists())])
    dist.all_reduce(ends)
    time.sleep(0.002)
same = kernels == torch._C._dispatch_dump("c10d::allreduce_")
sys.stdout.write(f"same kernels {same}\\n")  # at once: both ranks write to one pipe
dist.destroy_process_group()
"""


@pytest.mark.usefixtures("observer_library")
def test_what_c_plus_plus_sends_is_seen_from_the_attach_on(training: Training, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(script_of(RANKS))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, training.stop],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=training.environment,
    )  # fmt: skip
    rings = training.folder / "rings"
    time.sleep(1)
    wait_for(lambda: len(training.lens("attach", "--check", "--all-ranks", str(process.pid))["processes"]) == 2)
    words = ("--all-ranks", str(process.pid), "--server", "http://127.0.0.1:9", "--wait", "60")
    reply = training.lens("attach", *words)
    assert [found["state"] for found in reply["processes"]] == ["watching"] * 2, reply
    time.sleep(1)
    training.lens("detach", "--all-ranks", str(process.pid))
    training.stop.touch()
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert said.splitlines() == ["same kernels True"] * 2
    numbered = []
    for main in rings.glob("*/*/main.ring"):
        assert RingReader(main).about["collectives"] == "native"
        (ring,) = main.parent.glob("native-*.ring")
        part = RingReader(ring).poll()
        calls = [record for record in iter_records(part) if record["type"] == COLLECTIVE] if part else []
        reduced = {call["bytes"] for call in calls if call["name"] == "all_reduce"}
        assert reduced == {4, (16 + 1) * 3 * 4}  # the reducer's bucket, and what the loop itself sends
        numbers = [call["seq"] for call in calls]
        assert sorted(numbers) == list(range(min(numbers), min(numbers) + len(numbers)))
        numbered.append({call["seq"]: call["bytes"] for call in calls})
    both = numbered[0].keys() & numbered[1].keys()
    assert len(both) > 20
    assert all(numbered[0][number] == numbered[1][number] for number in both)


def test_what_cannot_be_attached_to_is_refused_with_a_fix(training: Training) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        reply = training.lens("attach", str(sleeper.pid))
        assert "is no Python interpreter" in reply["error"]
        assert reply["hint"]
        checked = training.lens("attach", "--check", str(sleeper.pid))["processes"][0]
        assert (checked["can"], checked["refusal"]["rule"]) == (False, "not Python")
        sleeper.kill()
    assert "none of these processes is watched" in training.lens("detach", str(os.getpid()))["error"]
