"""A compiled training, attached to while it runs: its graphs stay as they are, and so do its numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.attach.test_attached import PACE_S, Training
from tests.hooks.ringside import read_rings
from tests.waiting import wait_for

pytestmark = pytest.mark.processes
TRAINING = """
import sys, time, torch, torch.distributed as dist
from pathlib import Path
from torch._dynamo.utils import counters

stop, steps, pace = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.set_num_threads(1)
torch.manual_seed(0)
torch._logging.set_logs(recompiles=True)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
whole = torch.nn.parallel.DistributedDataParallel(model)
model.compile(backend="aot_eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
update = torch.compile(optimizer.step, backend="aot_eager")

@torch.compile(backend="aot_eager")
def mean_over_ranks(output):
    mean = output.square().mean()
    dist.all_reduce(mean.detach())
    return mean

def graphs():
    return {kind: dict(counters[kind]) for kind in ("stats", "graph_break")}

for step in range(steps):
    loss = mean_over_ranks(whole(torch.randn(8, 16)))
    optimizer.zero_grad()
    loss.backward()
    update()
    print(step, loss.item().hex(), flush=True)
    if step == 5:
        before = graphs()
    if step > 5:
        time.sleep(pace)
        if stop.exists():
            break
print("same graphs" if before == graphs() else f"CHANGED {before} {graphs()}", flush=True)
"""


def test_a_compiled_training_keeps_its_graphs_and_its_losses(tmp_path: Path) -> None:
    training = Training(tmp_path)
    process = training.start(100_000, PACE_S, TRAINING)
    wait_for(lambda: len(training.lines()) > 10, 120)
    attach = ("attach", str(process.pid), "--server", "http://127.0.0.1:9", "--wait", "60")
    (found,) = training.lens(*attach)["processes"]
    assert found["state"] == "watching", found
    seen = len(training.lines())
    wait_for(lambda: len(training.lines()) > seen + 30)
    training.lens("detach", str(process.pid))
    seen = len(training.lines())
    wait_for(lambda: len(training.lines()) > seen + 10)
    training.stop.touch()
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    watched = training.lines()
    assert watched[-1] == "same graphs"
    # torch compiles the wrapper around a compiled optimizer's step for a number of hooks: once with ours, into no graph.
    assert re.findall(r"Recompiling function (\w+)", said) in ([], ["wrapper"]), said
    (recorded,) = read_rings(training.folder / "rings")
    assert len(recorded.steps) >= 20
    assert {"forward", "backward", "optimizer"} <= {phase["name"] for phase in recorded.phases}
    assert {"all_reduce"} <= {call["name"] for call in recorded.collectives}
    training.stop.unlink()
    training.start(len(watched) - 1, 0, TRAINING).communicate(timeout=200)
    assert training.lines() == watched
