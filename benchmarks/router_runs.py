"""Trainings compiled whole, and in parallel, with and without lens: graphs, graph breaks, losses, tokens of experts.

The second table of benchmarks/routers.py. Each program counts its experts' tokens itself and prints them, with its
losses bit by bit and what torch.compile says; it is run alone, under ``lens run``, and under ``lens run`` with
LENS_COMPILED_EXPERTS=1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.hooks.ringside import Recorded, read_rings, run_python, script_of

_MODEL = """
import json
import os
import torch
import torch.distributed as dist

class Router(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 16))
        self.top_k = 2

    def forward(self, tokens):
        logits = tokens @ self.weight.t()
        weights, chosen = logits.softmax(-1).topk(2, -1)
        return logits, weights, chosen

class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.gate = Router()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, tokens):
        _, weights, chosen = self.gate(tokens)
        shares = torch.zeros(tokens.shape[0], 4).scatter(-1, chosen, weights)
        mixed = sum(expert(tokens) * shares[:, number, None] for number, expert in enumerate(self.experts))
        return tokens + mixed, chosen

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, tokens):
        given = []
        for layer in self.layers:
            tokens, chosen = layer(tokens)
            given.append(chosen)
        return tokens.pow(2).mean(), given
"""

_STEPS = """
losses, counts = [], []
for step in range(5):
    loss, given = called(torch.randn(12, 16))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item().hex())
    counts.append([torch.bincount(chosen.flatten(), minlength=4).tolist() for chosen in given])
    if step == 2:
        with torch.no_grad():
            called(torch.randn(12, 16))
found = torch._dynamo.utils.counters
rank = dist.get_rank() if dist.is_initialized() else 0
told = json.dumps({
    "rank": rank, "losses": losses, "counts": counts,
    "graphs": found["stats"]["unique_graphs"], "breaks": sum(found["graph_break"].values()),
})
open(f"told.{rank}", "w").write(told)
"""

PROGRAMS: dict[str, tuple[str, int]] = {
    "torch.compile(fullgraph=True)": (
        _MODEL + "torch.manual_seed(0)\nmodel = Model()\ncalled = torch.compile(model, fullgraph=True)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)\n" + _STEPS, 1,
    ),
    "model.compile(fullgraph=True)": (
        _MODEL + "torch.manual_seed(0)\nmodel = called = Model()\nmodel.compile(fullgraph=True)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)\n" + _STEPS, 1,
    ),
    "DDP of a compiled model, 2 ranks": (
        _MODEL + "dist.init_process_group('gloo')\ntorch.manual_seed(dist.get_rank())\nmodel = Model()\n"
        "called = torch.nn.parallel.DistributedDataParallel(torch.compile(model, fullgraph=True))\n"
        "optimizer = torch.optim.AdamW(called.parameters(), lr=0.01)\n" + _STEPS + "dist.destroy_process_group()\n", 2,
    ),
    "FSDP2, 2 ranks": (
        _MODEL + "from torch.distributed.fsdp import fully_shard\ndist.init_process_group('gloo')\n"
        "torch.manual_seed(0)\nmodel = called = Model()\nfor part in (*model.layers, model):\n    fully_shard(part)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)\nimport torch._dynamo.utils\n" + _STEPS
        + "dist.destroy_process_group()\n", 2,
    ),
}  # fmt: skip


class Run(NamedTuple):
    """One program, one way of running it."""

    program: str
    way: str
    graphs: str
    breaks: int
    counts: str
    losses_equal: bool
    right: bool

    def line(self) -> str:
        """Its row."""
        loss = "the same bits" if self.losses_equal else "DIFFER"
        verdict = "right" if self.right else "WRONG"
        return (
            f"| {self.program}, {self.way} | {self.graphs} | {self.breaks} | {self.counts} | {loss} | {verdict} |"
        )


def runs() -> list[Run]:
    """Every program in every way."""
    found = []
    for name, (text, world) in PROGRAMS.items():
        alone, _ = run(text, world, None)
        for way, environment in (("lens run", {}), ("LENS_COMPILED_EXPERTS=1", {"LENS_COMPILED_EXPERTS": "1"})):
            found.append(compared(name, way, alone, *run(text, world, environment)))
    return found


def run(text: str, world: int, environment: dict[str, str] | None) -> tuple[list[dict[str, Any]], list[Recorded]]:
    """What each rank tells, and what was recorded; without an environment: without lens."""
    with tempfile.TemporaryDirectory() as folder:
        rings = Path(folder) / "rings"
        script = Path(folder) / "script.py"
        script.write_text(script_of(text))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
        command = [*launch, str(script)]
        lens = ["-m", "lens", "run", "--", sys.executable] if environment is not None else []
        done = run_python([*lens, *command], rings, timeout=300, **(environment or {}))
        if done.returncode:
            raise subprocess.SubprocessError(done.stderr)
        told = [json.loads((Path(folder) / f"told.{rank}").read_text()) for rank in range(world)]
        return told, read_rings(rings)


def compared(
    name: str, way: str, alone: list[dict[str, Any]], told: list[dict[str, Any]], recorded: list[Recorded]
) -> Run:
    """The row."""
    losses = [one["losses"] == other["losses"] for one, other in zip(alone, told, strict=True)]
    same = all(one["counts"] == other["counts"] for one, other in zip(alone, told, strict=True))
    seen = [
        [
            [list(v["values"]) for v in sorted(one.vectors, key=lambda v: v["layer"]) if v["step"] == step]
            for step in range(5)
        ]
        for one in recorded
    ]
    compiled = bool(alone[0]["graphs"])
    expected = [one["counts"] for one in told]
    if seen == expected:
        counts, fine = "equal", True
    elif not any(step for one in seen for step in one):
        # Compiled regions are left alone unless somebody asks.
        counts, fine = "not counted", compiled and way == "lens run"
    else:
        counts, fine = "DIFFER", False
    graphs = f"{told[0]['graphs']} (without lens {alone[0]['graphs']})"
    breaks = max(one["breaks"] for one in told)
    same_graphs = all(one["graphs"] == other["graphs"] for one, other in zip(alone, told, strict=True))
    return Run(
        name,
        way,
        graphs,
        breaks,
        counts,
        all(losses) and same,
        fine and all(losses) and same and same_graphs and not breaks,
    )
