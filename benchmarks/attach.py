"""What it takes to enter a running process: attempts, successes, harm, how long it stands still, how long until data.

A line is queued again and again in the main thread of programs that were not prepared: a loop that allocates all the
time, under every CPython found, and rank 0 of a DDP training, wherever it is (forward, backward, waiting for data, in
a collective), and a main thread that only joins another. Then whole attaches, until the first step is in the store, and
steps after a detach beside those before.

    python benchmarks/attach.py [--quick] [--peers PYTHON] [--json] [--out FILE]

PYTHON has memray, py-spy or hypno installed: they enter the same loop.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import attach_leaves
import psutil
from attach_programs import ALLOCATING, JOINING, PLACES, TRAINING, UNPREPARED
from page_table import table

from lens.attach import inject
from lens.attach.preflight import OLDEST
from lens.attach.ptrace import TraceError

HANG_S = 5.0
BEAT = struct.Struct("=qqqq")


@dataclass
class Tally:
    """What became of the attempts on one kind of program."""

    name: str
    attempts: int = 0
    successes: int = 0
    crashes: int = 0
    hangs: int = 0
    refused: int = 0
    stopped_ms: list[float] = field(default_factory=list)
    answer_ms: list[float] = field(default_factory=list)
    extra_ms: list[float] = field(default_factory=list)

    def row(self) -> dict[str, object]:
        """For the table; None where nothing was measured."""
        return {
            "program": self.name, "attempts": self.attempts, "successes": self.successes, "crashes": self.crashes,
            "hangs": self.hangs, "refused": self.refused, "stop_p50_ms": _quantile(self.stopped_ms, 0.5),
            "stop_p99_ms": _quantile(self.stopped_ms, 0.99), "run_p50_ms": _quantile(self.answer_ms, 0.5),
            "longest_extra_ms": max(self.extra_ms, default=None),
        }  # fmt: skip


class Beat:
    """What a program says of itself: where it is, its turns, its longest turn, and how often a line ran in it."""

    def __init__(self, folder: Path, name: str = "beat") -> None:
        self.path = folder / name
        self.path.write_bytes(bytes(4096))
        with self.path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 4096)

    @property
    def words(self) -> tuple[int, int, int, int]:
        """Place, turns, longest turn since `forget` in ns, lines run."""
        place, turns, longest, seen = BEAT.unpack_from(self._page)
        return place, turns, longest, seen

    def forget(self) -> None:
        """Begin the longest turn anew; returns once the program has."""
        turns = self.words[1]
        self._page[32] = 1
        until(lambda: self.words[1] > turns + 1)


def until(condition: Callable[[], bool], patience_s: float = HANG_S) -> bool:
    """Look until it holds; whether it did."""
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.0002)
    return True


@contextmanager
def program(python: str, code: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running program that has said it is there."""
    child = subprocess.Popen([python, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    if not child.stdout.readline():
        raise SystemExit(f"{python} cannot run the program")
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lens-attach-") as name:
        yield Path(name)


def interpreters() -> dict[str, str]:
    """One program of each supported CPython, by version."""
    found = {platform.python_version(): sys.executable}
    pyenv = Path(shutil.which("pyenv") or "/nowhere").resolve().parents[1] / "versions"
    for minor in range(OLDEST[1], 14):
        for path in sorted(pyenv.glob(f"3.{minor}.*/bin/python3"))[-1:]:
            if minor != sys.version_info[1]:
                found[path.parents[1].name] = str(path)
    return dict(sorted(found.items(), key=lambda item: tuple(map(int, item[0].split(".")))))


def enter(
    child: subprocess.Popen[bytes], beat: Beat, places: inject.Addresses, tally: Tally, at: int | None
) -> bool:
    """One attempt; whether the program can be tried again."""
    turns = beat.words[1]
    usual = None
    if turns:
        beat.forget()
        began = beat.words[1]
        until(lambda: beat.words[1] >= began + 10)
        usual = beat.words[2]
        beat.forget()
    if at is not None and not until(lambda: beat.words[0] == at):
        return False
    tally.attempts += 1
    seen, asked = beat.words[3], time.monotonic()
    try:
        tally.stopped_ms.append(1e3 * inject.run_line(child.pid, "note()", places).stopped_s)
    except TraceError:
        tally.refused += 1
        return child.poll() is None
    if not turns:
        time.sleep(0.01)
        inject.wake(child.pid)
    ran = until(lambda: beat.words[3] > seen or child.poll() is not None)
    if child.poll() is not None:
        tally.crashes += 1
        return False
    if not ran:
        tally.hangs += 1
        return False
    tally.answer_ms.append(1e3 * (time.monotonic() - asked))
    if usual is not None:
        now = beat.words[1]
        if not until(lambda: beat.words[1] > now + 1):
            tally.hangs += 1
            return False
        tally.extra_ms.append(max(0.0, (beat.words[2] - usual) / 1e6))
    tally.successes += 1
    return True


def many(name: str, python: str, code: str, count: int) -> Tally:
    """Attempts on a program of one process, started anew where one was harmed."""
    tally = Tally(name)
    while tally.attempts < count:
        with folder() as place:
            beat = Beat(place)
            with program(python, code, str(beat.path)) as child:
                places = inject.locate(child.pid)
                while tally.attempts < count and enter(child, beat, places, tally, None):
                    pass
    return tally


def training(counts: dict[str, int]) -> list[Tally]:
    """Attempts on rank 0 of a training of two ranks, at each place of its step."""
    tallies = [Tally(f"DDP loop, in {name}") for name in counts]
    with folder() as place:
        beat, other = Beat(place), Beat(place, "other")
        store = str(place / "store")
        first = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(other.path), "1", store], stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            with program(sys.executable, TRAINING, str(beat.path), "0", store) as child:
                until(lambda: beat.words[1] > 20, 60)
                places = inject.locate(child.pid)
                for tally, (name, count) in zip(tallies, counts.items(), strict=True):
                    while tally.attempts < count:
                        if not enter(child, beat, places, tally, PLACES.index(name)):
                            raise SystemExit(f"the training was harmed: {tally.row()}")
        finally:
            first.kill()
            first.communicate()
    return tallies


def first_data(times: int) -> list[float]:
    """Seconds from `lens attach` to the first step in the store."""
    return [seconds for _ in range(times) if (seconds := one_attach()) is not None]


def one_attach() -> float | None:
    """A server, an unprepared training, and an attach; None where no step came within a minute."""
    with folder() as place:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "LENS_DATA": str(place / "data"),
            "LENS_RINGS": str(place / "rings"),
            "LENS_AGENT_LINGER": "2",
        }
        server = subprocess.Popen(
            [sys.executable, "-m", "lens", "serve", "--port", str(port)], env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            with program(sys.executable, UNPREPARED) as child:
                if not until(lambda: _answers(port), 60):
                    raise SystemExit("the server did not start")
                asked = time.monotonic()
                attached = subprocess.Popen(
                    [sys.executable, "-m", "lens", "attach", str(child.pid), "--json"], env=environment,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
                came = until(lambda: _has_steps(place / "data"), 60)
                took = time.monotonic() - asked
                attached.wait(60)
                return took if came else None
        finally:
            # The agent of the killed training sends what it has and ends, if there is a server; until then it writes here.
            until(lambda: not _used(place, server.pid), 60)
            server.terminate()
            server.wait(30)


def _used(place: Path, server: int) -> bool:
    """Whether a process besides the server and its own lives whose data lies there."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("LENS_DATA") == str(place / "data") and server not in (
                process.pid,
                process.ppid(),
            ):
                return True
    return False


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _has_steps(data: Path) -> bool:
    import lens

    with suppress(Exception), lens.open("latest", data=data) as run:
        return run.about()["last_step"] is not None
    return False


PEERS: dict[str, tuple[str, Callable[[str, int, Path], list[str]]]] = {
    "memray attach (gdb)": (
        "memray",
        lambda python, pid, place: [
            python, "-m", "memray", "attach", "--method", "gdb", "-o", str(place / f"{time.monotonic_ns()}.bin"), str(pid),
        ],
    ),
    "py-spy dump (read-only)": (
        "py_spy", lambda python, pid, place: [str(Path(python).parent / "py-spy"), "dump", "--pid", str(pid)],
    ),
    "hypno": ("hypno", lambda python, pid, place: [python, "-m", "hypno", str(pid), "note()"]),
}  # fmt: skip


def peer(name: str, python: str, command: Callable[[str, int, Path], list[str]], count: int) -> Tally:
    """What another tool does to the same loop; each attempt on a program of its own."""
    tally = Tally(name)
    for _ in range(count):
        with folder() as place:
            beat = Beat(place)
            with program(python, ALLOCATING, str(beat.path)) as child:
                _peer_enters(child, beat, lambda pid, place=place: command(python, pid, place), tally)
    return tally


def _peer_enters(
    child: subprocess.Popen[bytes], beat: Beat, command: Callable[[int], list[str]], tally: Tally
) -> None:
    until(lambda: beat.words[1] > 200)
    usual = beat.words[2]
    beat.forget()
    tally.attempts += 1
    asked = time.monotonic()
    try:
        failed = subprocess.run(command(child.pid), capture_output=True, timeout=60).returncode != 0
    except subprocess.TimeoutExpired:
        failed = True
    took = 1e3 * (time.monotonic() - asked)
    turns = beat.words[1]
    goes_on = until(lambda: beat.words[1] > turns + 2 or child.poll() is not None)
    if child.poll() is not None:
        tally.crashes += 1
    elif not goes_on:
        tally.hangs += 1
    elif failed:
        tally.refused += 1
    else:
        tally.successes += 1
        tally.answer_ms.append(took)
        tally.extra_ms.append(max(0.0, (beat.words[2] - usual) / 1e6))


def _quantile(values: list[float], share: float) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return median(values) if share == 0.5 else quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


def summary(tallies: list[Tally], first_data_s: list[float], after: list[float]) -> dict[str, object]:
    """One number a question; peers are not in it."""
    ours = [tally for tally in tallies if tally.name not in PEERS]
    stopped = [each for tally in ours for each in tally.stopped_ms]
    return {
        "attempts": sum(tally.attempts for tally in ours), "successes": sum(tally.successes for tally in ours),
        "target_deaths": sum(tally.crashes + tally.hangs for tally in ours),
        "stop_p50_ms": _quantile(stopped, 0.5), "stop_p99_ms": _quantile(stopped, 0.99),
        "longest_extra_ms": max((each for tally in ours for each in tally.extra_ms), default=None),
        "first_data_s": median(first_data_s) if first_data_s else None, "step_ratio_after_detach": median(after),
    }  # fmt: skip


def main() -> int:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the attempts")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with memray, py-spy or hypno installed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()
    share = 20 if options.quick else 1
    tallies = [
        many(f"allocating loop, CPython {version}", python, ALLOCATING, 1000 // share)
        for version, python in interpreters().items()
    ]
    tallies += training(dict.fromkeys(PLACES, 100 // share))
    tallies.append(many("th.join", sys.executable, JOINING, 100 // share))
    if not options.peers:
        print(f"absent (no --peers): {', '.join(PEERS)}")
    for name, (module, command) in PEERS.items() if options.peers else ():
        there = subprocess.run(
            [options.peers, "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec('{module}') is None)"]
        )
        if there.returncode == 0 or module == "py_spy":
            tallies.append(peer(name, options.peers, command, max(2, 40 // share)))
        else:
            print(f"{name}: absent")
    seconds = first_data(1 if options.quick else 5)
    after = attach_leaves.measure("plain", *((2, 60) if options.quick else (20, 200))).after()
    rows = [tally.row() for tally in tallies]
    first = ", ".join(f"{each:.2f}" for each in seconds) or "no step came"
    page = (
        f"{table(list(rows[0]), [list(row.values()) for row in rows])}\n\nSeconds from `lens attach` to the first step in "
        f"the store: {first}. A step after a detach by one before it: {median(after):.3f} (median of {len(after)} attaches "
        "of one training; `make prove-attach` has more)."
    )
    load = f"load {os.getloadavg()[0]:.1f}"
    if options.out:
        options.out.write_text(
            f"# Entering running processes\n\n`python benchmarks/attach.py` on {os.cpu_count()} cores, {load}, "
            f"{time.strftime('%Y-%m-%d')}.\n\n{page}\n"
        )
    print(f"{page}\n\n{load}")
    if options.json:
        print(
            json.dumps(
                {**summary(tallies, seconds, after), "rows": rows, "quick": options.quick, "load": os.getloadavg()}
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
