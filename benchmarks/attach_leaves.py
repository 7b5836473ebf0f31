"""What an attach leaves behind: steps before, during and after it, and losses, names and graphs of the training.

Each training runs twice with the same seed: with cycles of attach and detach, and alone. A cycle is four blocks of
steps: two before (what differs between these is chance), one attached, one after. A block's number is the median of its
steps; ratios are taken within a cycle, since a machine's pace drifts.

    python benchmarks/attach_leaves.py [--cycles N] [--steps N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from attach_programs import LEAVES
from page_table import table

WARM_UP_STEPS, SETTLING_STEPS = 150, 20
PATIENCE_S = 120.0
PROGRAMS = {
    "plain": "one process",
    "ddp": "DDP over gloo",
    "aot_eager": "DDP, its model compiled (aot_eager)",
    "inductor": "DDP, its model compiled (inductor)",
}
HEAD = (
    "training", "cycles of 4 × steps", "step before, ms", "chance: again / before", "attached / before", "after / before",
    "main thread's processor time: again / before", "the same: after / before", "losses", "names", "graphs",
    "recompilations",
)  # fmt: skip


@dataclass
class Cycle:
    """Median step of each block, s."""

    before: float
    again: float
    attached: float
    after: float

    @property
    def usual(self) -> float:
        """Of both blocks before."""
        return (self.before + self.again) / 2


class Program:
    """A training in a process of its own, and `lens` beside it."""

    def __init__(self, kind: str, folder: Path, steps: int = 0) -> None:
        self._folder = folder
        self.out = folder / "out.json"
        page = folder / "page"
        page.write_bytes(bytes(4096))
        with page.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 4096)
        self.environment = {
            **os.environ, "LENS_RINGS": str(folder / "rings"), "LENS_DATA": str(folder / "data"), "LENS_AGENT": "0",
        }  # fmt: skip
        self._said = (folder / "err").open("w+")
        self.child = subprocess.Popen(
            [sys.executable, "-c", LEAVES, kind, str(page), str(self.out), str(steps)],
            env=self.environment, stderr=self._said, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Steps done."""
        return int(struct.unpack_from("=q", self._page)[0])

    def go_on(self, steps: int) -> tuple[int, int]:
        """Wait for so many more steps; the first and the last of them."""
        first, end = self.step, time.monotonic() + PATIENCE_S
        while self.step < first + steps:
            if self.child.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the training does not go on: {(self._folder / 'err').read_text()[-2000:]}")
            time.sleep(0.005)
        return first, first + steps

    def lens(self, *words: str) -> Any:
        """What a verb says."""
        found = subprocess.run(
            [sys.executable, "-m", "lens", *words, str(self.child.pid), "--json"],
            capture_output=True, text=True, env=self.environment, timeout=PATIENCE_S,
        )  # fmt: skip
        return json.loads(found.stdout.splitlines()[-1])["processes"][0]

    def end(self, ask: bool = True) -> tuple[Any, str]:
        """What it kept of itself, and its standard error."""
        if ask:
            self._page[8] = 1
        self.child.wait(PATIENCE_S * 5)
        return json.loads(self.out.read_text()), (self._folder / "err").read_text()


@dataclass
class Left:
    """What one training was before, during and after its attaches. took, worked: by the clock, of its main thread."""

    took: list[Cycle]
    worked: list[Cycle]
    same_losses: int
    losses: int
    same_names: bool
    same_graphs: bool
    recompilations: int

    def after(self) -> list[float]:
        """A step after the detach by one before, cycle by cycle."""
        return [one.after / one.usual for one in self.took]


def measure(kind: str, cycles: int, steps: int) -> Left:
    """Attach to this training and detach again, so many times."""
    blocks = []
    with tempfile.TemporaryDirectory(prefix="lens-attach-") as name:
        program = Program(kind, Path(name))
        program.go_on(WARM_UP_STEPS)
        for _ in range(cycles):
            places = [program.go_on(steps), program.go_on(steps)]
            if program.lens("attach", "--server", "http://127.0.0.1:9")["state"] != "watching":
                raise SystemExit("the attach failed")
            program.go_on(SETTLING_STEPS)
            places.append(program.go_on(steps))
            if not program.lens("detach")["left"]:
                raise SystemExit("the detach failed")
            program.go_on(SETTLING_STEPS)
            places.append(program.go_on(steps))
            blocks.append(places)
        kept, said = program.end()
    with tempfile.TemporaryDirectory(prefix="lens-attach-") as name:
        alone, _ = Program(kind, Path(name), len(kept["took"])).end(ask=False)
    same = sum(a == b for a, b in zip(kept["losses"], alone["losses"], strict=True))
    return Left(
        _cycles(blocks, kept["took"]), _cycles(blocks, kept["worked"]), same, len(alone["losses"]), kept["names"],
        kept["graphs"], len(re.findall("Recompiling function", said)),
    )  # fmt: skip


def run(kind: str, cycles: int, steps: int) -> list[str]:
    """A line of the table."""
    left = measure(kind, cycles, steps)
    return [
        PROGRAMS[kind], f"{cycles} × {steps}", f"{1e3 * median(one.before for one in left.took):.3f}",
        _ratios([one.again / one.before for one in left.took]), _ratios([one.attached / one.usual for one in left.took]),
        _ratios(left.after()),
        _ratios([one.again / one.before for one in left.worked]), _ratios([one.after / one.usual for one in left.worked]),
        f"{left.same_losses:,} of {left.losses:,} bit for bit", _sameness(left.same_names), _sameness(left.same_graphs),
        str(left.recompilations),
    ]  # fmt: skip


def _cycles(blocks: list[list[tuple[int, int]]], took: list[int]) -> list[Cycle]:
    return [Cycle(*(median(took[first:last]) / 1e9 for first, last in places)) for places in blocks]


def _sameness(same: bool) -> str:
    return "identical" if same else "CHANGED"


def _ratios(values: list[float]) -> str:
    """Median, and between which two numbers nine of ten lie."""
    if len(values) < 3:
        return ", ".join(f"{value:.3f}" for value in values)
    cuts = quantiles(values, n=20, method="inclusive")
    return f"{median(values):.3f} ({cuts[0]:.3f} to {cuts[-1]:.3f})"


def main() -> int:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=20, help="attaches of each training (default %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each block (default %(default)s)")
    parser.add_argument("--only", choices=PROGRAMS, action="append", help="this training; may be repeated")
    parser.add_argument("--out", type=Path, help="write the page there too")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows = [run(kind, options.cycles, options.steps) for kind in options.only or PROGRAMS]
    page = (
        "# What an attach leaves behind\n\n"
        f"`python benchmarks/attach_leaves.py` on {os.cpu_count()} cores, Python {platform.python_version()}, load "
        f"{load:.1f} when it began, {time.strftime('%Y-%m-%d')}. Each cycle is before, again, attached, after; ratios are "
        "of the medians of one cycle's blocks: their median, and in brackets where nine of ten of them lie. The yardstick "
        "is chance: a ratio within its range tells nothing, and on a machine with other work that range is wide. Losses are "
        "compared with the same training alone; names are those that an attach replaces, after the last detach; graphs "
        "are dynamo's own counts of graphs and of breaks.\n\n" + table(HEAD, rows) + "\n"
    )
    print(page)
    if options.out:
        options.out.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
