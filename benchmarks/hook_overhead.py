"""What watching costs the training process, per step, in host time.

A real training step of about 20 ms, one thread, with collectives between its blocks: real enough to evict caches,
which makes every call several times dearer than in a loop of its own. Both numbers are printed. What is measured, and
how, is in `benchmarks/cadence.py`: blocks of steps with and without lens take turns, the medians are subtracted, so
that neither the clock nor the plain calls count.

    python benchmarks/hook_overhead.py [--quick] [--json] [--python]

It measures what is recorded with: what `lens doctor --build` has compiled, or Python where that is not there or
``--python`` says so.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore

import lens
from benchmarks.cadence import TrainingStep, clock
from lens.hooks import native
from lens.ring_reader import RingReader
from lens.settings import Settings
from lens.slots import STEP, iter_records

PEERS = {"trackio": "trackio", "traceml": "traceml_ai"}
"""Peer -> module that its package installs."""
COLLECTIVES = (11, 60)
ROUTERS = 4
BLOCK_STEPS = 10
_native = True
BEYOND = ("log of two values", "routers")
"""Edges that are the training's own calls into lens, or depend on its model: told apart, not part of the sum."""


@contextlib.contextmanager
def watching(step: TrainingStep | None, rings: Path) -> Iterator[None]:
    """lens in its default mode, its ring in shared memory as always."""
    settings = Settings.load({}, rings=rings, agent=False, native=tier() == "native")
    model, optimizer = (step.network, step.optimizer) if step else (None, None)
    lens.watch(model, optimizer, run="bench", settings=settings)
    try:
        yield
    finally:
        lens.detach()


def tier() -> str:
    """Who records: what is compiled, or Python."""
    return "native" if _native and native.complete() else "python"


class Measured:
    """Steps with and without lens, in blocks that take turns."""

    def __init__(self, step: TrainingStep, blocks: int, rings: Path) -> None:
        self._edges: dict[str, list[dict[str, int]]] = {"off": [], "on": [], "again": []}
        self._times: dict[str, list[float]] = {"off": [], "on": [], "again": []}
        self._reported: list[int] = []
        with step.noted_backward():
            for _ in range(blocks):
                for mode in ("off", "on", "again"):
                    self._block(step, mode, rings)

    def _block(self, step: TrainingStep, mode: str, rings: Path) -> None:
        on = mode == "on"
        with watching(step, rings) if on else contextlib.nullcontext():
            batches = iter(lens.data(step.batches())) if on else step.batches()
            step.run(batches, on)
            measured = [step.run(batches, on) for _ in range(BLOCK_STEPS)]
        if on:
            self._reported += _overheads(rings)
            shutil.rmtree(rings)
        self._times[mode].append(statistics.median(took for took, _ in measured))
        self._edges[mode] += [edges for _, edges in measured]

    @property
    def host_us(self) -> float:
        """Microseconds a step."""
        return self._added(lambda edges: sum(ns for name, ns in edges.items() if name not in BEYOND))

    @property
    def items_us(self) -> dict[str, float]:
        """Microseconds a step at each edge."""
        names = list(self._edges["on"][0])
        return {name: self._added(lambda edges, name=name: edges[name]) for name in names}  # type: ignore[misc]

    @property
    def reported_us(self) -> float:
        """Microseconds a step that the hook itself says it took."""
        return statistics.median(self._reported) / 1000

    @property
    def step_ms(self) -> float:
        """Length of a step without lens."""
        return statistics.median(self._times["off"]) / 1e6

    @property
    def ratio(self) -> float:
        """Length of a step with lens, of one without."""
        return _ratio(self._times["on"], self._times["off"])

    @property
    def ratio_aa(self) -> float:
        """Length of a step without lens, of one without: the noise."""
        return _ratio(self._times["again"], self._times["off"])

    def _added(self, of: Callable[[dict[str, int]], int]) -> float:
        on, off, again = (statistics.median(map(of, self._edges[mode])) for mode in ("on", "off", "again"))
        return (on - (off + again) / 2) / 1000


def back_to_back(count: int, rings: Path) -> float:
    """Nanoseconds that the hook adds to one collective in a loop of nothing else."""
    buffer = torch.ones(1024)

    def loop() -> float:
        began = clock()
        for _ in range(count):
            dist.all_reduce(buffer)
        return (clock() - began) / count

    plain = min(loop() for _ in range(5))
    with watching(None, rings):
        watched = min(loop() for _ in range(5))
    shutil.rmtree(rings)
    return watched - plain


def log_time(log: Callable[[dict[str, float]], None], count: int, steps: int) -> float:
    """Mean microseconds of one call with `count` values, one a step of real work."""
    step = TrainingStep(0.020, 0)
    values = {f"metric{number}": number / 7 for number in range(count)}
    spent: list[int] = []
    with step.noted_backward():
        batches = step.batches()
        for _ in range(steps):
            step.run(batches, False)
            began = clock()
            log(values)
            spent.append(clock() - began)
    return statistics.fmean(spent[2:]) / 1000


def lens_log_times(steps: int, rings: Path) -> dict[str, float]:
    """``lens.log`` with 30 and 100 values."""
    with watching(None, rings):
        found = {f"log{count}_mean_us": log_time(lens.log, count, steps) for count in (30, 100)}
    shutil.rmtree(rings)
    return found


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
    """Microseconds that TraceML's step wrapper adds to a step; None where it is not installed or does not trace."""
    if not installed("traceml"):
        return {"added_us_traceml": None}
    traceml = importlib.import_module(PEERS["traceml"])
    try:
        # Without its aggregator it would go on without tracing, and look cheap.
        traceml.init(mode="auto", on_missing_aggregator="raise")
    except Exception as error:
        print(f"TraceML does not trace here (start `traceml serve`): {error}", file=sys.stderr)
        return {"added_us_traceml": None}
    step = TrainingStep(0.020, 0)
    differences = []
    with step.noted_backward():
        batches = step.batches()
        for _ in range(blocks):
            medians = []
            for traced in (False, True):
                took = []
                for _ in range(BLOCK_STEPS):
                    began = clock()
                    with traceml.trace_step(step.network) if traced else contextlib.nullcontext():
                        step.run(batches, False)
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
    # In Python a fake has a `wait` of its own; works of real backends have the one of their base class.
    del FakeWork.wait
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    folder = Path(tempfile.mkdtemp(prefix="lens-bench-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    rings = folder / "rings"
    try:
        few, many = (Measured(TrainingStep(0.020, count), blocks, rings) for count in COLLECTIVES)
        short = Measured(TrainingStep(0.002, COLLECTIVES[0]), blocks, rings)
        routed = Measured(TrainingStep(0.020, 0, ROUTERS), blocks, rings)
        plain = Measured(TrainingStep(0.020, 0), blocks, rings)
        extra = (many.host_us - few.host_us) / (COLLECTIVES[1] - COLLECTIVES[0])
        return {
            "host_us_per_step_11": few.host_us,
            "host_us_per_step_60": many.host_us,
            "tier": tier(),
            "ns_per_event": back_to_back(loops, rings),
            "ns_per_event_at_cadence": extra * 1000,
            "reported_us_per_step_11": few.reported_us,
            "items_us": few.items_us,
            "log2_us": few.items_us["log of two values"],
            "router_us": (routed.items_us["routers"] + routed.host_us - plain.host_us) / ROUTERS,
            "step_ratio_20ms": few.ratio,
            "step_ratio_2ms": short.ratio,
            "step_ratio_aa": few.ratio_aa,
            "step_ratio_aa_2ms": short.ratio_aa,
            **lens_log_times(steps, rings),
            **trackio_log_times(steps, folder / "trackio"),
            **traceml_added(blocks),
            "step_ms": few.step_ms,
            "blocks": blocks,
            "steps_a_block": BLOCK_STEPS,
            "log_steps": steps,
            "peers_absent": [peer for peer in PEERS if not installed(peer)],
        }
    finally:
        dist.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)


def _overheads(rings: Path) -> list[int]:
    """What the hook has said of its own time in the steps measured, ns."""
    (path,) = rings.glob("*/*/main.ring")
    part = RingReader(path).poll()
    assert part is not None
    return [record["overhead_ns"] for record in iter_records(part) if record["type"] == STEP][-BLOCK_STEPS:]


def _ratio(with_it: list[float], without: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(with_it, without, strict=True))


ROWS = (
    ("host time a step, 11 collectives, at cadence", "host_us_per_step_11", "µs"),
    ("host time a step, 60 collectives, at cadence", "host_us_per_step_60", "µs"),
    ("the hook's own word for it, 11 collectives", "reported_us_per_step_11", "µs"),
    ("one collective more, at cadence", "ns_per_event_at_cadence", "ns"),
    ("one collective, back to back", "ns_per_event", "ns"),
    ("lens.log of loss and gradient norm, at cadence", "log2_us", "µs"),
    ("tokens of experts, one router, at cadence", "router_us", "µs"),
    ("20 ms step with lens / without", "step_ratio_20ms", ""),
    ("20 ms step without / without (noise)", "step_ratio_aa", ""),
    ("2 ms step with lens / without", "step_ratio_2ms", ""),
    ("2 ms step without / without (noise)", "step_ratio_aa_2ms", ""),
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
    parser.add_argument("--python", action="store_true", help="the recorder in Python, whatever is compiled")
    options = parser.parse_args()
    global _native
    _native = not options.python
    found = measure(options.quick)
    print(f"{found['step_ms']:.1f} ms a step, one thread, recorder: {found['tier']}\n")
    for label, key, unit in ROWS:
        value = found[key]
        shown = "absent (not installed, or not running)" if value is None else f"{value:10.3f} {unit}"
        print(f"{label:<48} {shown}")
    print("\nwhere the host time goes, 11 collectives:")
    for name, microseconds in found["items_us"].items():
        print(f"  {name:<46} {microseconds:10.3f} µs" + (" (not in the sum)" if name in BEYOND else ""))
    if found["peers_absent"]:
        print(f"\npeers not installed here: {', '.join(found['peers_absent'])}")
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
