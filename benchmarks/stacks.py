"""Reading where processes stand: how often it succeeds, is right, harms or holds up, and how long it takes.

The stacks of programs that were not prepared are read again and again: a loop that allocates all the time, under every
CPython found, a main thread that joins another, and rank 0 of a DDP training while it trains and while rank 1 is stopped,
so that rank 0 hangs in a collective. A stack is right when it begins at the program's first line of code and each line
lies in the program or in a file that exists.

    python benchmarks/stacks.py [--quick] [--peers PYTHON] [--json] [--out FILE]

PYTHON has py-spy installed: it reads the same loop.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from attach import Beat, folder, interpreters, program, until
from attach_programs import ALLOCATING, JOINING, TRAINING
from page_table import table

from lens.attach import frames
from lens.attach.facts import look

_START_S = 90


@dataclass
class Tally:
    """What became of the readings of one kind of program."""

    name: str
    readings: int = 0
    right: int = 0
    wrong: int = 0
    unreadable: int = 0
    crashes: int = 0
    took_ms: list[float] = field(default_factory=list)
    extra_ms: float | None = None
    """By how much the program's longest turn while it was read was longer than the longest before."""

    def row(self) -> dict[str, object]:
        """For the table; None where nothing was measured."""
        return {
            "program": self.name, "readings": self.readings, "right": self.right, "wrong": self.wrong,
            "unreadable": self.unreadable, "crashes": self.crashes,
            "p50_ms": median(self.took_ms) if self.took_ms else None,
            "p99_ms": quantiles(self.took_ms, n=100, method="inclusive")[98] if len(self.took_ms) > 1 else None,
            "longest_extra_ms": self.extra_ms,
        }  # fmt: skip


def is_right(found: list[frames.ThreadStack], code: str) -> bool:
    """Whether these can be the stacks of a program whose text this is."""
    lines = len(code.splitlines())
    main = found[0]
    outermost = main.frames[-1] if main.frames else None
    if not main.main or outermost is None or (outermost.file, outermost.name) != ("<string>", "<module>"):
        return False
    return all(
        frame.line is not None and frame.line <= lines if frame.file == "<string>"
        else frame.file.startswith("<") or Path(frame.file).exists()
        for stack in found for frame in stack.frames
    )  # fmt: skip


def again(tally: Tally, child: subprocess.Popen[bytes], code: str, count: int, beat: Beat | None = None) -> Tally:
    """Read a program so often."""
    version = look(child.pid).version
    assert version is not None
    usual = turns_of(beat) if beat else None
    for _ in range(count):
        tally.readings += 1
        began = time.monotonic()
        try:
            found = frames.read(child.pid, version)
        except frames.UnreadableError:
            tally.unreadable += 1
            if child.poll() is not None:
                tally.crashes += 1
                return tally
            continue
        tally.took_ms.append(1e3 * (time.monotonic() - began))
        right = is_right(found, code)
        tally.right += right
        tally.wrong += not right
    tally.crashes += child.poll() is not None
    if beat and usual is not None:
        tally.extra_ms = max(0.0, (beat.words[2] - usual) / 1e6)
    return tally


def turns_of(beat: Beat) -> int:
    """The longest of a second's turns, undisturbed; then it is counted anew."""
    beat.forget()
    time.sleep(1)
    usual = beat.words[2]
    beat.forget()
    return usual


def training(count: int) -> list[Tally]:
    """Rank 0 of two, while it trains, and while it waits in a collective for a rank that is stopped."""
    trains, hangs = Tally("DDP loop, training"), Tally("DDP loop, hanging in a collective")
    with folder() as place:
        beat, other, store = Beat(place), Beat(place, "other"), str(place / "store")
        second = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(other.path), "1", store], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            with program(sys.executable, TRAINING, str(beat.path), "0", store) as first:
                if not until(lambda: beat.words[1] > 20, _START_S):
                    raise SystemExit("the training did not start")
                again(trains, first, TRAINING, count, beat)
                second.send_signal(signal.SIGSTOP)
                turns = -1
                while turns != beat.words[1]:
                    turns = beat.words[1]
                    time.sleep(0.5)
                again(hangs, first, TRAINING, count)
                second.send_signal(signal.SIGCONT)
                if not until(lambda: beat.words[1] > turns + 10, _START_S):
                    raise SystemExit("the training did not go on")
        finally:
            second.kill()
            second.wait()
    return [trains, hangs]


def by_command(name: str, command: Callable[[int], list[str]], count: int) -> Tally:
    """What a command that reads stacks does to the allocating loop; how long it takes with its start."""
    tally = Tally(name)
    with folder() as place:
        beat = Beat(place)
        with program(sys.executable, ALLOCATING, str(beat.path)) as child:
            until(lambda: beat.words[1] > 200)
            usual = turns_of(beat)
            for _ in range(count):
                tally.readings += 1
                began = time.monotonic()
                done = subprocess.run(command(child.pid), capture_output=True, text=True, timeout=60, check=False)
                tally.took_ms.append(1e3 * (time.monotonic() - began))
                if done.returncode != 0:
                    tally.unreadable += 1
                else:
                    tally.right += "<module>" in done.stdout
                    tally.wrong += "<module>" not in done.stdout
            tally.extra_ms = max(0.0, (beat.words[2] - usual) / 1e6)
            tally.crashes += child.poll() is not None
    return tally


def loops(code: str, name: str, programs: dict[str, str], count: int) -> list[Tally]:
    """One program under each of these interpreters."""
    found = []
    for version, python in programs.items():
        with folder() as place:
            beat = Beat(place)
            with program(python, code, str(beat.path)) as child:
                time.sleep(0.5)
                found.append(
                    again(Tally(f"{name}, CPython {version}"), child, code, count, beat if beat.words[1] else None)
                )
    return found


def main() -> int:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the readings")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with py-spy installed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()
    share = 20 if options.quick else 1
    tallies = loops(ALLOCATING, "allocating loop", interpreters(), 1000 // share)
    tallies += loops(JOINING, "th.join", interpreters(), 200 // share)
    tallies += training(1000 // share)
    own = [sys.executable, "-m", "lens", "attach", "--stacks"]
    tallies.append(by_command("lens attach --stacks, the command", lambda pid: [*own, str(pid)], 40 // share))
    if options.peers:
        spy = str(Path(options.peers).parent / "py-spy")
        for name, more in (("py-spy dump", []), ("py-spy dump --nonblocking", ["--nonblocking"])):
            tallies.append(
                by_command(name, lambda pid, more=more: [spy, "dump", *more, "--pid", str(pid)], 40 // share)
            )
    rows = [tally.row() for tally in tallies]
    load = f"{os.getloadavg()[0]:.1f}"
    shown = table(list(rows[0]), [list(row.values()) for row in rows])
    print(json.dumps({"rows": rows, "load": load}) if options.json else f"{shown}\n\nload {load}")
    if options.out:
        options.out.write_text(
            f"# Reading where processes stand\n\n`python benchmarks/stacks.py` on {os.cpu_count()} cores, load {load}, "
            f"{time.strftime('%Y-%m-%d')}.\n\n{shown}\n\nThe rows of commands count their start; the others do not. "
            "The longest turn of a loop depends on what else the machine does.\n"
        )
    return 1 if any(tally.wrong or tally.crashes for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
