"""What watching costs the training process, per step, in host time.

A real training step of about 20 ms, one thread, with collectives between its blocks: real enough to evict caches,
which makes every call several times dearer than in a loop of its own. Both numbers are printed.

The hook's time is measured at its edges: from the user's call into it until the original begins, and from the
original's end until the user's code goes on. The same edges are timed without lens, and the medians subtracted, so
that neither the clock nor the plain calls count. The collectives do nothing: their own time would be noise here.

    python benchmarks/hook_overhead.py [--quick] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import nn

import lens
from lens.settings import Settings

PEERS = {"trackio": "trackio", "traceml": "traceml_ai"}
"""Peer -> module that its package installs."""
COLLECTIVES = (11, 60)
BLOCK_STEPS = 10
STEP_S = 0.020
clock = time.perf_counter_ns


class Edges:
    """Adds up the time between the user's code and the originals it calls."""

    def __init__(self) -> None:
        self.total = 0
        self._since = 0

    def leave(self) -> None:
        """User code, or an original, hands over."""
        self._since = clock()

    def arrive(self) -> None:
        """An original, or user code, takes over."""
        self.total += clock() - self._since


class Network(nn.Module):
    """Blocks of small layers, as many as bring a step to about 20 ms."""

    def __init__(self, blocks: int, edges: Edges) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(blocks)
        )
        self.edges = edges
        self.calls: Callable[[int], None] = lambda block: None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.edges.arrive()
        for index, block in enumerate(self.blocks):
            batch = block(batch)
            self.calls(index)
        loss = batch.square().mean()
        self.edges.leave()
        return loss


class Optimizer(torch.optim.SGD):
    """SGD that notes where its own step begins and ends."""

    edges: Edges

    def step(self, closure: Any = None) -> Any:
        self.edges.arrive()
        result = super().step(closure)
        self.edges.leave()
        return result


class Step:
    """One training step with a number of collectives, and the edges it crosses."""

    def __init__(self, collectives: int) -> None:
        torch.manual_seed(0)
        self.edges = Edges()
        self.network = Network(_blocks_for(STEP_S), self.edges)
        self.optimizer = Optimizer(self.network.parameters(), lr=0.001)
        self.optimizer.edges = self.edges
        self.network.calls = self._collectives_after
        self._buffer = torch.ones(1024)
        blocks = len(self.network.blocks)
        self._after = [collectives * (n + 1) // blocks - collectives * n // blocks for n in range(blocks)]

    def _collectives_after(self, block: int) -> None:
        for _ in range(self._after[block]):
            self.edges.leave()
            dist.all_reduce(self._buffer)
            self.edges.arrive()

    def run(self, watched: bool, batches: Iterator[torch.Tensor], extra: Callable[[], None]) -> tuple[int, int]:
        """One step; returns its time and the time at the edges, ns."""
        edges = self.edges
        edges.total = 0
        began = clock()
        edges.leave()
        batch = next(batches)
        edges.arrive()
        edges.leave()
        with lens.step() if watched else contextlib.nullcontext():
            edges.arrive()
            edges.leave()
            loss = self.network(batch)
            edges.arrive()
            edges.leave()
            torch.autograd.backward(loss)
            edges.arrive()
            edges.leave()
            self.optimizer.step()
            edges.arrive()
            self.optimizer.zero_grad()
            extra()
            edges.leave()
        edges.arrive()
        return clock() - began, edges.total


@contextlib.contextmanager
def backward_through(edges: Edges) -> Iterator[None]:
    """``torch.autograd.backward`` that notes where the original begins and ends."""
    original = torch.autograd.backward

    def backward(loss: torch.Tensor) -> None:
        edges.arrive()
        original(loss)
        edges.leave()

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


def batches_through(edges: Edges) -> Iterator[torch.Tensor]:
    """A loader that costs nothing itself."""
    batch = torch.randn(4, 32, 64)
    while True:
        edges.arrive()
        edges.leave()
        yield batch


@contextlib.contextmanager
def watching(step: Step, rings: Path) -> Iterator[None]:
    """lens in its default mode, its ring in shared memory as always."""
    settings = Settings.load({}, rings=rings, agent=False)
    lens.watch(step.network, step.optimizer, settings=settings)
    try:
        yield
    finally:
        lens.detach()
        shutil.rmtree(rings)


def do_nothing() -> None:
    """Nothing beyond the step."""


def host_time(collectives: int, blocks: int, rings: Path) -> dict[str, float]:
    """Microseconds a step at cadence, and step time ratios of neighbouring blocks with and without lens."""
    step = Step(collectives)
    with backward_through(step.edges):
        return _host_time(step, blocks, rings)


def _host_time(step: Step, blocks: int, rings: Path) -> dict[str, float]:
    times: dict[str, list[float]] = {"off": [], "on": [], "again": []}
    edges: dict[str, list[int]] = {"off": [], "on": [], "again": []}
    for _ in range(blocks):
        for mode in ("off", "on", "again"):
            with watching(step, rings) if mode == "on" else contextlib.nullcontext():
                batches = iter(batches_through(step.edges))
                if mode == "on":
                    batches = iter(lens.data(batches))
                step.run(mode == "on", batches, do_nothing)
                measured = [step.run(mode == "on", batches, do_nothing) for _ in range(BLOCK_STEPS)]
            times[mode].append(statistics.median(took for took, _ in measured))
            edges[mode] += [crossed for _, crossed in measured]
    without = statistics.median(edges["off"] + edges["again"])
    return {
        "host_us": (statistics.median(edges["on"]) - without) / 1000,
        "step_ms": statistics.median(times["off"]) / 1e6,
        "ratio": _ratio(times["on"], times["off"]),
        "ratio_aa": _ratio(times["again"], times["off"]),
    }


def back_to_back(count: int, rings: Path) -> float:
    """Nanoseconds that the hook adds to one collective in a loop of nothing else."""
    buffer = torch.ones(1024)

    def loop() -> float:
        began = clock()
        for _ in range(count):
            dist.all_reduce(buffer)
        return (clock() - began) / count

    plain = min(loop() for _ in range(5))
    lens.watch(settings=Settings.load({}, rings=rings, agent=False))
    try:
        return min(loop() for _ in range(5)) - plain
    finally:
        lens.detach()
        shutil.rmtree(rings)


def log_time(log: Callable[[dict[str, float]], None], count: int, steps: int) -> float:
    """Mean microseconds of one call with `count` values, one a step of real work."""
    step = Step(0)
    values = {f"metric{number}": number / 7 for number in range(count)}
    batches = iter(batches_through(step.edges))
    spent: list[int] = []

    def call() -> None:
        began = clock()
        log(values)
        spent.append(clock() - began)

    for _ in range(steps):
        step.run(False, batches, call)
    return statistics.fmean(spent[2:]) / 1000


def lens_log_times(steps: int, rings: Path) -> dict[str, float]:
    """``lens.log`` with 30 and 100 values."""
    lens.watch(settings=Settings.load({}, rings=rings, agent=False))
    try:
        return {f"log{count}_mean_us": log_time(lens.log, count, steps) for count in (30, 100)}
    finally:
        lens.detach()
        shutil.rmtree(rings)


def trackio_log_times(steps: int, folder: Path) -> dict[str, float | None]:
    """The same through trackio, into its own local database; None where it is not installed."""
    keys = [f"log{count}_mean_us_trackio" for count in (30, 100)]
    if not installed("trackio"):
        return dict.fromkeys(keys)
    os.environ |= {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    trackio = importlib.import_module("trackio")
    with contextlib.redirect_stdout(io.StringIO()):
        trackio.init(project="hook-overhead", name="run", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    found = {f"log{count}_mean_us_trackio": log_time(trackio.log, count, steps) for count in (30, 100)}
    with contextlib.redirect_stdout(io.StringIO()):
        trackio.finish()
    return {**found}


def traceml_added(blocks: int) -> dict[str, float | None]:
    """Microseconds that TraceML's step wrapper adds to a step; None where it is not installed."""
    if not installed("traceml"):
        return {"added_us_traceml": None}
    traceml = importlib.import_module(PEERS["traceml"])
    traceml.init(mode="auto")
    step = Step(0)
    batches = iter(batches_through(step.edges))
    differences = []
    for _ in range(blocks):
        medians = []
        for traced in (False, True):
            took = []
            for _ in range(BLOCK_STEPS):
                began = clock()
                with traceml.trace_step(step.network) if traced else contextlib.nullcontext():
                    step.run(False, batches, do_nothing)
                took.append(clock() - began)
            medians.append(statistics.median(took))
        differences.append(medians[1] - medians[0])
    return {"added_us_traceml": statistics.median(differences) / 1000}


def installed(peer: str) -> bool:
    """Whether a peer can be measured here."""
    return importlib.util.find_spec(PEERS[peer]) is not None


def measure(quick: bool) -> dict[str, Any]:
    """All keys of this benchmark, with the sizes they were measured at."""
    blocks, steps, loops = (8, 60, 20_000) if quick else (40, 400, 200_000)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gloo = dist.all_reduce
    dist.all_reduce = _no_op
    folder = Path(tempfile.mkdtemp(prefix="lens-bench-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    rings = folder / "rings"
    try:
        few, many = (host_time(count, blocks, rings) for count in COLLECTIVES)
        extra = (many["host_us"] - few["host_us"]) / (COLLECTIVES[1] - COLLECTIVES[0])
        return {
            "host_us_per_step_11": few["host_us"],
            "host_us_per_step_60": many["host_us"],
            "tier": "python",
            "ns_per_event": back_to_back(loops, rings),
            "ns_per_event_at_cadence": extra * 1000,
            "step_ratio_20ms": few["ratio"],
            "step_ratio_aa": few["ratio_aa"],
            **lens_log_times(steps, rings),
            **trackio_log_times(steps, folder / "trackio"),
            **traceml_added(blocks),
            "step_ms": few["step_ms"],
            "blocks": blocks,
            "steps_a_block": BLOCK_STEPS,
            "log_steps": steps,
            "peers_absent": [peer for peer in PEERS if not installed(peer)],
        }
    finally:
        dist.all_reduce = gloo
        dist.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)


def _no_op(tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> None:
    """A collective that takes no time."""


def _blocks_for(seconds: float) -> int:
    """How many blocks make a step this long on this machine."""
    block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    batch = torch.randn(4, 32, 64)
    took = []
    for _ in range(60):
        began = time.perf_counter()
        block(batch).square().mean().backward()
        took.append(time.perf_counter() - began)
    # The quickest: what the machine's other work adds is not the step's.
    return max(2, round(seconds / min(took)))


def _ratio(with_it: list[float], without: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(with_it, without, strict=True))


ROWS = (
    ("host time a step, 11 collectives, at cadence", "host_us_per_step_11", "µs"),
    ("host time a step, 60 collectives, at cadence", "host_us_per_step_60", "µs"),
    ("one collective, at cadence", "ns_per_event_at_cadence", "ns"),
    ("one collective, back to back", "ns_per_event", "ns"),
    ("step with lens / without", "step_ratio_20ms", ""),
    ("step without / without (noise)", "step_ratio_aa", ""),
    ("lens.log, 30 values, mean", "log30_mean_us", "µs"),
    ("trackio, 30 values, mean", "log30_mean_us_trackio", "µs"),
    ("lens.log, 100 values, mean", "log100_mean_us", "µs"),
    ("trackio, 100 values, mean", "log100_mean_us_trackio", "µs"),
    ("TraceML, added to a step", "added_us_traceml", "µs"),
)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    options = parser.parse_args()
    found = measure(options.quick)
    print(f"{found['step_ms']:.1f} ms a step, one thread, recorder: {found['tier']}\n")
    for label, key, unit in ROWS:
        value = found[key]
        shown = "absent (not installed)" if value is None else f"{value:10.3f} {unit}"
        print(f"{label:<48} {shown}")
    if found["peers_absent"]:
        print(f"\npeers not installed here: {', '.join(found['peers_absent'])}")
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
