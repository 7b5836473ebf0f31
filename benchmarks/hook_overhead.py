"""What watching costs the training process, per step, in host time.

A real training step of about 20 ms, one thread, with collectives between its blocks: real enough to evict caches,
which makes every call several times dearer than in a loop of its own. Both numbers are printed. What is measured, and
how, is in `benchmarks/cadence.py`: clocks at the edges where the hook stands, in blocks of steps with and without lens
that take turns. Whole steps with and without are compared too, beside the noise of the same run.

    python benchmarks/hook_overhead.py [--quick] [--json] [--python] [--peers VENV/bin/python]
                                       [--traceml VENV/bin/traceml] [--out FILE]

It measures what is recorded with: what `lens doctor --build` has compiled, or Python where that is not there or
``--python`` says so. Peers are measured in the same step, each in the environment that is named (`hook_peers.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore

import lens
from benchmarks import hook_peers
from benchmarks.cadence import Added, Paired, Spent, TrainingStep, added, clock, in_turns
from lens.hooks import native
from lens.ring_reader import RingReader
from lens.settings import Settings
from lens.slots import STEP, iter_records

COLLECTIVES = (11, 60)
ROUTERS = 4
BLOCK_STEPS = 10
WARM_STEPS = 8
"""Steps with lens before any is measured: in the first ones the model's operations are counted, and backends are asked for
the number of every collective."""
_native = True
PEER_KEYS = {
    **{
        name: tuple(f"log{count}_{what}_us" for count in hook_peers.LOGGED for what in ("mean", "median", "p99"))
        for name in hook_peers.TRACKERS
    },
    "traceml": ("added_us_traceml", "added_p90_us_traceml", "step_ratio_traceml", "step_ratio_aa_traceml"),
}
"""Peer -> what is measured of it."""
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
    """Steps with and without lens, in blocks that take turns, the first and the last without."""

    def __init__(self, step: TrainingStep, blocks: int, rings: Path) -> None:
        self._blocks: list[list[Spent]] = []
        self._times: list[float] = []
        self._reported: list[int] = []
        # In Python lens stands around the functions of torch.distributed, compiled below them.
        with step.noted(collectives=tier() == "python"):
            for number in range(2 * blocks + 1):
                self._block(step, number % 2 == 1, rings)

    def _block(self, step: TrainingStep, on: bool, rings: Path) -> None:
        with watching(step, rings) if on else contextlib.nullcontext(), step.noted_last():
            batches = iter(lens.data(step.batches())) if on else step.batches()
            for _ in range(WARM_STEPS if on else 1):
                step.run(batches, on)
            measured = [step.run(batches, on) for _ in range(BLOCK_STEPS)]
        if on:
            self._reported += _overheads(rings)
            shutil.rmtree(rings)
        self._times.append(statistics.median(took for took, _ in measured))
        self._blocks.append([edges for _, edges in measured])

    @property
    def host(self) -> Paired:
        """At all edges where the hook stands by itself."""
        return in_turns(self._blocks, self._own)

    @property
    def spread(self) -> Added:
        """The same of single steps: how far nine of ten stay below."""
        return added(self._of_blocks(1), self._of_blocks(0), self._own)

    @property
    def noise(self) -> Paired:
        """The same of steps without lens, over those before and after them."""
        return in_turns(self._blocks[::2], self._own)

    @property
    def items_us(self) -> dict[str, float]:
        """Microseconds a step at each edge."""
        return {name: in_turns(self._blocks, [name]).typical for name in self._names}

    @property
    def reported_us(self) -> float:
        """Microseconds a step that the hook itself says it took."""
        return statistics.median(self._reported) / 1000

    @property
    def step_ms(self) -> float:
        """Length of a step without lens."""
        return statistics.median(self._times[::2]) / 1e6

    @property
    def ratio(self) -> float:
        """Length of a step with lens, of one without."""
        return _ratio(self._times)

    @property
    def ratio_aa(self) -> float:
        """Length of a step without lens, of one without: the noise."""
        return _ratio(self._times[::2])

    def _of_blocks(self, first: int) -> list[Spent]:
        return [spent for block in self._blocks[first::2] for spent in block]

    @property
    def _names(self) -> list[str]:
        return list(self._blocks[1][0])

    @property
    def _own(self) -> list[str]:
        return [name for name in self._names if name not in BEYOND]


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


def calls_a_step(rings: Path) -> dict[str, float]:
    """Frames of Python that lens adds to a step with 11 collectives, what they call in C, and the records of a step:
    counted, not timed."""
    step, package, frames, calls = TrainingStep(0.002, COLLECTIVES[0]), str(Path(lens.__file__).parent), 0, 0

    def count(frame: Any, event: str, what: Any) -> None:
        nonlocal frames, calls
        code = frame.f_code
        # But for `lens.log`, which is the training's own call; what is asked of dynamo is asked by lens alone here.
        ours = code.co_filename.startswith(package) and not (code.co_name == "log" or "values" in code.co_filename)
        frames += event == "call" and (ours or code.co_name == "is_dynamo_compiling")
        calls += event == "c_call" and ours

    warm = steps = 20
    with step.noted(), watching(step, rings):
        batches = iter(lens.data(step.batches()))
        for number in range(warm + steps):
            if number >= warm:
                sys.setprofile(count)
            try:
                step.run(batches, True)
            finally:
                sys.setprofile(None)
    records = _records(rings)
    measured = [record["step"] for record in records if record["type"] == STEP][-steps:]
    events = sum(record.get("step") in measured for record in records)
    shutil.rmtree(rings)
    return {
        "events_per_step_11": events / steps,
        "frames_per_step_11": frames / steps,
        "c_calls_per_step_11": calls / steps,
    }


def lens_log_times(steps: int, rings: Path) -> dict[str, float]:
    """``lens.log`` with 30 and 100 values."""
    with watching(None, rings):
        found = hook_peers.log_times(lambda values, step: lens.log(values), steps)
    shutil.rmtree(rings)
    return found


def peers(python: str | None, traceml: Path | None, steps: int) -> dict[str, Any]:
    """What the peers cost in the same step; None where one was not measured, and why in ``peers_absent``."""
    found: dict[str, Any] = {"peers_absent": {}, "peer_versions": {}}
    said = {name: hook_peers.measured(python, name, steps) for name in hook_peers.TRACKERS}
    said["traceml"] = hook_peers.traceml_measured(traceml, steps)
    for name, keys in PEER_KEYS.items():
        reply = said[name]
        for key in keys:
            found[key if name == "traceml" else f"{key}_{name}"] = reply.get(key)
        if "absent" in reply:
            found["peers_absent"][name] = reply["absent"]
        else:
            found["peer_versions"][name] = reply["version"]
    return found


def measure(quick: bool, python: str | None, traceml: Path | None) -> dict[str, Any]:
    """All keys of this benchmark, with the sizes they were measured at."""
    blocks, steps, loops = (12, 60, 20_000) if quick else (60, 400, 200_000)
    torch.set_num_threads(1)
    # In Python a fake has a `wait` of its own; works of real backends have the one of their base class.
    del FakeWork.wait
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    folder = Path(tempfile.mkdtemp(prefix="lens-bench-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    rings = folder / "rings"
    try:
        few, many = (Measured(TrainingStep(0.020, count), blocks, rings) for count in COLLECTIVES)
        short = Measured(TrainingStep(0.002, COLLECTIVES[0]), blocks, rings)
        routed = Measured(TrainingStep(0.020, 0, ROUTERS), max(6, blocks // 4), rings)
        extra = (many.host.typical - few.host.typical) / (COLLECTIVES[1] - COLLECTIVES[0])
        found = {
            **{
                f"{key}_{count}": value
                for count, measured in zip(COLLECTIVES, (few, many), strict=True)
                for key, value in {
                    "host_us_per_step": measured.host.typical,
                    "host_us_low": measured.host.low,
                    "host_us_high": measured.host.high,
                    "host_p90_us": measured.spread.p90,
                    "edges_p90_us": measured.spread.p90_without,
                    "noise_us": measured.noise.typical,
                    "noise_us_low": measured.noise.low,
                    "noise_us_high": measured.noise.high,
                }.items()
            },
            "tier": tier(),
            "ns_per_event": back_to_back(loops, rings),
            "ns_per_event_at_cadence": extra * 1000,
            "reported_us_per_step_11": few.reported_us,
            "reported_us_per_step_60": many.reported_us,
            "items_us": few.items_us,
            "log2_us": few.items_us["log of two values"],
            "router_us": (routed.items_us["routers"] + max(0.0, routed.items_us["step ends"])) / ROUTERS,
            "step_ratio_20ms": few.ratio,
            "step_ratio_2ms": short.ratio,
            "step_ratio_aa": few.ratio_aa,
            "step_ratio_aa_2ms": short.ratio_aa,
            **calls_a_step(rings),
            **lens_log_times(steps, rings),
            "step_ms": few.step_ms,
            "blocks": blocks,
            "steps_a_block": BLOCK_STEPS,
            "log_steps": steps,
        }
    finally:
        dist.destroy_process_group()
        shutil.rmtree(folder, ignore_errors=True)
    return {**found, **peers(python, traceml, steps)}


def _overheads(rings: Path) -> list[int]:
    """What the hook has said of its own time in the steps measured, ns."""
    return [record["overhead_ns"] for record in _records(rings) if record["type"] == STEP][-BLOCK_STEPS:]


def _records(rings: Path) -> list[dict[str, Any]]:
    """What the rings hold, that of the training's own and those of what is compiled."""
    parts = (RingReader(path).poll() for path in rings.glob("*/*/*.ring"))
    return [record for part in parts if part is not None for record in iter_records(part)]


def _ratio(times: list[float]) -> float:
    """Every second one over its neighbours."""
    return statistics.median(2 * times[n] / (times[n - 1] + times[n + 1]) for n in range(1, len(times) - 1, 2))


ROWS = (
    ("host time a step, 11 collectives, at cadence", "host_us_per_step_11", "µs"),
    ("  with 95 % confidence not less than", "host_us_low_11", "µs"),
    ("  and not more than", "host_us_high_11", "µs"),
    ("  nine of ten steps stay below", "host_p90_us_11", "µs"),
    ("  nine of ten steps without lens", "edges_p90_us_11", "µs"),
    ("  steps without lens over others without (noise)", "noise_us_11", "µs"),
    ("  the hook's own word", "reported_us_per_step_11", "µs"),
    ("host time a step, 60 collectives, at cadence", "host_us_per_step_60", "µs"),
    ("  with 95 % confidence not less than", "host_us_low_60", "µs"),
    ("  and not more than", "host_us_high_60", "µs"),
    ("  nine of ten steps stay below", "host_p90_us_60", "µs"),
    ("  nine of ten steps without lens", "edges_p90_us_60", "µs"),
    ("  steps without lens over others without (noise)", "noise_us_60", "µs"),
    ("  the hook's own word", "reported_us_per_step_60", "µs"),
    ("events a step, 11 collectives (counted)", "events_per_step_11", ""),
    ("frames of Python a step, 11 collectives (counted)", "frames_per_step_11", ""),
    ("  and what they call in C", "c_calls_per_step_11", ""),
    ("one collective more, at cadence", "ns_per_event_at_cadence", "ns"),
    ("one collective, back to back", "ns_per_event", "ns"),
    ("lens.log of loss and gradient norm, at cadence", "log2_us", "µs"),
    ("tokens of experts, one router, at cadence", "router_us", "µs"),
    ("20 ms step with lens / without", "step_ratio_20ms", ""),
    ("20 ms step without / without (noise)", "step_ratio_aa", ""),
    ("2 ms step with lens / without", "step_ratio_2ms", ""),
    ("2 ms step without / without (noise)", "step_ratio_aa_2ms", ""),
    ("TraceML, added at the edges of a step", "added_us_traceml", "µs"),
    ("20 ms step with TraceML / without", "step_ratio_traceml", ""),
    ("20 ms step without / without, beside it (noise)", "step_ratio_aa_traceml", ""),
)


def table(found: dict[str, Any]) -> list[str]:
    """Lines for people: (what, how much)."""
    lines = []
    for label, key, unit in ROWS:
        value = found[key]
        lines.append(f"{label:<50} " + ("absent" if value is None else f"{value:10.3f} {unit}"))
    lines += ["", f"{'one call a step, µs: mean · middle · p99':<50} {'':>8} {'times lens':>14}"]
    for count in hook_peers.LOGGED:
        own = found[f"log{count}_mean_us"]
        for name, suffix in (("lens.log", ""), *((name, f"_{name}") for name in hook_peers.TRACKERS)):
            three = [found[f"log{count}_{what}_us{suffix}"] for what in ("mean", "median", "p99")]
            shown = "absent" if three[0] is None else " · ".join(f"{value:,.0f}" for value in three)
            ratio = "" if three[0] is None else f"{three[0] / own:14.1f}"
            lines.append(f"{count:>4} values, {name:<38} {shown:<26}{ratio}")
    lines += ["", "where the host time goes, 11 collectives:"]
    for name, microseconds in found["items_us"].items():
        lines.append(f"  {name:<48} {microseconds:10.3f} µs" + (" (not in the sum)" if name in BEYOND else ""))
    lines += [f"absent: {name} ({why})" for name, why in found["peers_absent"].items()]
    return lines


def section(found: dict[str, Any]) -> list[str]:
    """The same as a part of a proof in Markdown."""
    what = f"{found['tier']} recorder, {found['step_ms']:.1f} ms a step"
    sizes = f"{found['blocks']} blocks of {found['steps_a_block']} steps each way"
    return [f"## {what.capitalize()}, {sizes}", "", "```", *table(found), "```", ""]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--python", action="store_true", help="the recorder in Python, whatever is compiled")
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment with trackio, wandb and tensorboard")
    parser.add_argument("--traceml", type=Path, metavar="COMMAND", help="its command, in an environment of its own")
    options = parser.parse_args()
    global _native
    _native = not options.python
    found = measure(options.quick, options.peers, options.traceml)
    print(f"{found['step_ms']:.1f} ms a step, one thread, recorder: {found['tier']}\n")
    print("\n".join(table(found)))
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
