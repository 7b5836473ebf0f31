"""Begin, train, leave, train again, a thousand times and in every way there is to begin: what is left behind?

Afterwards every name of torch and its classes must be what it was before the first, object for object; over all cycles
neither Python objects, file descriptors, threads, mapped rings nor memory may grow.

    python benchmarks/hook_leaves.py [--cycles 1000] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

import lens
from lens.hooks import api, native
from lens.hooks.session import Session
from lens.settings import Settings

WARM, FIRST_WARM, STEPS = 30, 500, 3
"""Cycles before it is counted, those of the first way (without lens too, a process holds more for some 450), and steps
of each."""
KIB_A_CYCLE = 1.0
"""Memory that may come with a cycle, KiB: what malloc keeps scatters; a leaked ring would be 1,024."""


class Held(NamedTuple):
    """What this process holds."""

    objects: int
    descriptors: int
    threads: int
    rings: int
    """Mapped ones."""
    memory_kib: int

    @classmethod
    def now(cls) -> Held:
        """As it is."""
        gc.collect()
        rings = Path("/proc/self/maps").read_text().count(".ring")
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
        descriptors, threads = (sum(1 for _ in Path(f"/proc/self/{name}").iterdir()) for name in ("fd", "task"))
        return cls(len(gc.get_objects()), descriptors, threads, rings, resident)


def names() -> dict[tuple[str, str], int]:
    """Every name of torch's modules and their classes -> the object that it names; but for numbers, which count."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] != "torch" or not isinstance(module, type(sys)):
            continue
        for attribute, value in list(vars(module).items()):
            named = {(name, attribute): value}
            if issubclass(type(value), type) and value.__module__ == name:
                named |= {(f"{name}.{attribute}", inner): each for inner, each in vars(value).items()}
            found |= {key: id(each) for key, each in named.items() if type(each) not in (int, float)}
    return found


def changed(named: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """What names something else, or nothing, or is new in a module that was there, since these were taken."""
    found = names()
    modules = {module for module, _ in named}
    return {key for key in {*named, *found} if named.get(key) != found.get(key) and key[0] in modules}


def unprepared(settings: Settings, model: Any, optimizer: Any) -> None:
    """As ``lens run`` begins."""
    api._begin_unprepared(lambda: settings, Session.watch_unprepared)


WAYS: dict[str, tuple[bool, Callable[[Settings, Any, Any], None]]] = {
    "lens.watch, compiled": (True, lambda settings, *both: lens.watch(*both, settings=settings)),
    "lens.watch, Python": (False, lambda settings, *both: lens.watch(*both, settings=settings)),
    "lens run": (True, unprepared),
    "lens attach": (True, lambda settings, *both: api.watch_running(settings)),
}
"""Way to begin -> whether the compiled recorder is used, and how it is begun with a model and an optimizer."""


def train(model: Any, optimizer: Any, buffer: Any, steps: int) -> None:
    """Some steps with collectives of every kind of caller."""
    for _ in range(steps):
        with lens.step():
            model(torch.ones(2, 4)).square().mean().backward()
            dist.all_reduce(buffer)
            dist.all_reduce(buffer, async_op=True).wait()
            optimizer.step()
            optimizer.zero_grad()
            lens.log({"train.loss": 1.0})


def cycle(way: str, rings: Path, buffer: Any) -> None:
    """Begin, train, leave, train."""
    compiled, begin = WAYS[way]
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = Settings.load({}, rings=rings, ring_mib=1, agent=False, native=compiled, max_overhead_pct=100)
    begin(settings, model, optimizer)
    if not lens.enabled():
        raise SystemExit(f"{way}: nothing is recorded")
    train(model, optimizer, buffer, STEPS)
    lens.detach()
    train(model, optimizer, buffer, 1)
    shutil.rmtree(rings)


def leaves(way: str, cycles: int, rings: Path, buffer: Any, named: dict[tuple[str, str], int]) -> dict[str, Any]:
    """What so many cycles of one way leave behind; `named` was taken when nothing of lens had been begun yet."""
    for _ in range(FIRST_WARM if way == next(iter(WAYS)) else WARM):
        cycle(way, rings, buffer)
    before = Held.now()
    for _ in range(cycles):
        cycle(way, rings, buffer)
    after = Held.now()
    found = changed(named)
    return {
        "way": way,
        "cycles": cycles,
        "names": len(named),
        "names_changed": sorted(".".join(key) for key in found)[:10],
        "before": before._asdict(),
        "after": after._asdict(),
    }


def holds(row: dict[str, Any]) -> bool:
    """Whether nothing was left."""
    before, after = row["before"], row["after"]
    same = all(after[key] <= before[key] for key in ("descriptors", "threads", "rings"))
    few = after["objects"] - before["objects"] < max(20, row["cycles"] / 10)
    small = after["memory_kib"] - before["memory_kib"] <= 512 + KIB_A_CYCLE * row["cycles"]
    return same and few and small and not row["names_changed"]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        "| begun by | cycles | names compared | changed | objects | descriptors | threads | mapped rings | memory, KiB | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = [f"{row['before'][key]:,} → {row['after'][key]:,}" for key in Held._fields]
        changed = ", ".join(row["names_changed"]) or "none"
        cells = [
            row["way"],
            f"{row['cycles']:,}",
            f"{row['names']:,}",
            changed,
            *counts,
            "holds" if holds(row) else "**leaks**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measure(cycles: int) -> list[dict[str, Any]]:
    """All ways, in one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    place = Path(tempfile.mkdtemp(prefix="lens-leaves-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        buffer = torch.ones(8)
        model = torch.nn.Linear(4, 4)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), buffer, STEPS)
        named = names()
        return [leaves(way, cycles, place / "rings", buffer, named) for way in WAYS]
    finally:
        shutil.rmtree(place, ignore_errors=True)
        dist.destroy_process_group()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=1000, help="of each way (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--out", type=Path, help="write the proof here")
    options = parser.parse_args()
    rows = measure(options.cycles)
    lines = table(rows)
    print("\n".join(lines))
    if options.out:
        head = [
            "# What the hook leaves behind", "",
            f"`python benchmarks/hook_leaves.py --cycles {options.cycles}`, {time.strftime('%Y-%m-%d')}, {platform.machine()}. Each cycle",
            "begins, trains three steps with collectives, leaves, trains once more. Compiled: "
            f"{'yes' if native.complete() else 'no, Python did it all'}.", "",
        ]  # fmt: skip
        options.out.write_text("\n".join([*head, *lines, ""]))
    if options.json:
        print(json.dumps(rows))
    return 0 if all(map(holds, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
