"""What the proofs of delivery play on: a trainer that records, an agent that ships, a server that stores.

The trainer records phases whose length follows from their number, and notes beside the ring how many it has recorded:
so what must be in the store is known, also of a trainer that was killed, and each stored row can be checked by itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

RUN = "crash-delivery"
RECORDS_PER_S = 1500
LIFE = 10_000_000
"""Numbers of one trainer; the next one goes on from the next multiple."""
PROCESSES = ("server", "agent", "trainer")
TRAINER = """
import mmap, struct, sys, time
from pathlib import Path
from lens.recorder import Recorder
from lens.settings import Settings
rate, first, stop, tally = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
tally.write_bytes(bytes(8))
with tally.open("r+b") as file:
    done = mmap.mmap(file.fileno(), 8)
recorder = Recorder.create(Settings.load(), {"rank": 0, "world_size": 1})
name, count, began = recorder.intern("forward"), 0, time.monotonic()
while not stop.exists():
    while count < (time.monotonic() - began) * rate:
        t0, number = time.monotonic_ns(), first + count
        recorder.phase(name, t0, t0 + 1 + number * 7919 % 100_003, number)
        count += 1
        struct.pack_into("<q", done, 0, count)
    time.sleep(0.005)
recorder.close()
"""
SHIFTED = """
import runpy, sys, time
from pathlib import Path
shift, now, clock_ns = Path(sys.argv[1]), time.time, time.time_ns
def shifted_ns():
    try:
        return clock_ns() + int(shift.read_text() or 0)
    except (OSError, ValueError):
        return clock_ns()
time.time_ns, time.time = shifted_ns, lambda: shifted_ns() / 1e9
sys.argv = ["lens", *sys.argv[2:]]
runpy.run_module("lens", run_name="__main__")
"""
"""Runs lens with a wall clock that is off by what a file says."""


def length_of(number: int) -> int:
    """Nanoseconds of the phase of this number."""
    return 1 + number * 7919 % 100_003


@dataclass
class Outcome:
    """What arrived, against what was recorded."""

    recorded: int
    stored: int
    lost: int
    doubled: int
    wrong: int
    """Rows that nobody recorded like this."""
    waiting: int
    """Batches still in the spool at the end."""
    counted: int
    """Slots that the store itself says were lost."""
    damaged: int
    """Damaged places that the agent tells of."""

    @property
    def holds(self) -> bool:
        """Whether nothing is doubled or wrong, and whatever is lost is told."""
        return not (self.doubled or self.wrong or self.waiting) and self.lost <= self.counted


class Stage:
    """Trainer, agent and server over one temporary folder."""

    def __init__(self, folder: Path, within: tuple[str, ...] = ()) -> None:
        self.within = within
        """What every command is put behind: a network namespace."""
        self.data, self.spool, self.rings = folder / "data", folder / "spool", folder / "rings"
        self.stop_file, self.shift_file, self.tallies = folder / "stop", folder / "shift", folder / "tallies"
        self.shifted = False
        """Whether server and agent read the clock of `shift_file`."""
        self.moments = 0
        """How often a fault has sent records of its own."""
        self.via: int | None = None
        """Port that the agent is told instead of the server's."""
        for path in (self.data, self.spool, self.tallies):
            path.mkdir(mode=0o700, exist_ok=True)
        self.environment = {
            **os.environ,
            "LENS_DATA": str(self.data),
            "LENS_SPOOL": str(self.spool),
            "LENS_RINGS": str(self.rings),
            "LENS_RUN": RUN,
            "LENS_HOST": "host0",
            "LENS_SHIP_S": "0.1",
            "LENS_AGENT_LINGER": "600",
            # A server that finds a backlog starts an agent itself: here the one that is to be killed must carry it.
            "LENS_AGENT": "0",
        }
        self.log = (folder / "log").open("ab")
        self.port = 0
        self.running: dict[str, subprocess.Popen[Any]] = {}

    def start(self, *names: str) -> None:
        """Start these of PROCESSES; the server answers when this returns."""
        for name in names:
            self.running[name] = getattr(self, f"_start_{name}")()

    def kill(self, *names: str) -> None:
        """kill -9 of all of these, then wait for their ends."""
        for name in names:
            self.running[name].kill()
        for name in names:
            self.running[name].wait()

    def end(self) -> None:
        """Nothing of the stage runs any more."""
        for child in self.running.values():
            if child.poll() is None:
                child.kill()
                child.wait()
        self.log.close()

    def ask(self, method: str, path: str, content: bytes | None = None, kind: str = "application/json") -> Any:
        """The server's answer."""
        token = (self.data / "token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind}
        asked = Request(f"http://127.0.0.1:{self.port}{path}", content, headers, method=method)
        with urlopen(asked, timeout=60) as reply:
            return json.load(reply)

    def spooled(self) -> list[Path]:
        """Segments of the spool that hold anything."""
        return sorted(path for path in self.spool.glob("*/*.segment") if path.stat().st_size)

    def finish(self) -> Outcome:
        """Let the trainer end and everything arrive, then compare."""
        self.stop_file.touch()
        self.running["trainer"].wait(60)
        end = time.monotonic() + 120
        while self._unread() and time.monotonic() < end:
            time.sleep(0.2)
        # What was killed left a backlog in the spool, which may take more than one agent's farewell: go on for as
        # long as it shrinks. A busy machine is slow, not wrong.
        waiting = self._stop_agent()
        while waiting:
            self.start("agent")
            time.sleep(10)
            before, waiting = waiting, self._stop_agent()
            if waiting >= before:
                break
        self.running["server"].send_signal(signal.SIGINT)
        self.running["server"].wait(120)
        return self._compare(waiting)

    def _start_server(self) -> subprocess.Popen[Any]:
        marker = self.data / "server.json"
        marker.unlink(missing_ok=True)
        child = self._lens("serve", "--data", str(self.data), "--port", str(self.port))
        end = time.monotonic() + 60
        while not marker.exists():
            if child.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: {Path(self.log.name).read_text()[-2000:]}")
            time.sleep(0.02)
        # The same port after every restart: agents keep the URL they were given.
        self.port = int(json.loads(marker.read_text())["url"].rsplit(":", 1)[1])
        return child

    def _start_agent(self) -> subprocess.Popen[Any]:
        return self._lens("agent", "--server", f"http://127.0.0.1:{self.via or self.port}")

    def _start_trainer(self) -> subprocess.Popen[Any]:
        lives = len(list(self.tallies.iterdir()))
        words = [str(RECORDS_PER_S), str(lives * LIFE), str(self.stop_file), str(self.tallies / f"{lives:04d}")]
        return self._popen([sys.executable, "-c", TRAINER, *words])

    def _lens(self, *words: str) -> subprocess.Popen[Any]:
        how = ["-c", SHIFTED, str(self.shift_file)] if self.shifted else ["-m", "lens"]
        return self._popen([sys.executable, *how, *words])

    def _popen(self, command: list[str]) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            [*self.within, *command],
            env=self.environment,
            stdout=self.log,
            stderr=self.log,
            cwd=Path(__file__).parents[1],
        )

    def _unread(self) -> bool:
        """Whether a trainer's ring is still there: the agent removes it once it has read everything."""
        return any('"trainer"' in path.read_text() for path in self.rings.glob("host0/*/about.json"))

    def _stop_agent(self) -> int:
        """End the agent; how many batches it leaves for the next one."""
        said = Path(self.log.name).stat().st_size
        self.running["agent"].send_signal(signal.SIGTERM)
        self.running["agent"].wait(60)
        with Path(self.log.name).open("rb") as log:
            log.seek(said)
            return sum(map(int, re.findall(rb"(\d+) batches stay", log.read())))

    def _compare(self, waiting: int) -> Outcome:
        from lens.store.query import Query

        query = Query.open_folder(self.data)
        try:
            _, tables = query.tables(RUN)
            overwritten = query.run(RUN)["drops"]["lost_slots"]
        finally:
            query.close()
        phases = tables.select("spans", tables.spans["kind"] == tables.code("phase"))
        lengths = (phases["t1_ns"] - phases["t0_ns"]).tolist()
        found = Counter(zip(phases["step"].tolist(), lengths, strict=True))
        recorded, may_be = 0, set()
        missing = 0
        for life, path in enumerate(sorted(self.tallies.iterdir())):
            (count,) = struct.unpack("<q", path.read_bytes())
            numbers = range(life * LIFE, life * LIFE + count)
            recorded += count
            missing += sum((number, length_of(number)) not in found for number in numbers)
            # A trainer that was killed may have recorded one more than it had noted.
            may_be.update((number, length_of(number)) for number in (*numbers, life * LIFE + count))
        return Outcome(
            recorded=recorded,
            stored=sum(found.values()),
            lost=missing,
            doubled=sum(found.values()) - len(found),
            wrong=sum(row not in may_be for row in found),
            waiting=waiting,
            counted=overwritten + total(tables, "lens.collector.dropped"),
            damaged=total(tables, "lens.spool.corrupt"),
        )


def total(tables: Any, metric: str) -> int:
    """All that a counter has counted; a decrease is a beginning anew."""
    rows = tables.select("samples", tables.samples["metric"] == tables.code(metric))
    values = [value for _, value in sorted(zip(rows["t_ns"].tolist(), rows["value"].tolist(), strict=True))]
    steps = (now if now < before else now - before for before, now in zip([0.0, *values], values, strict=False))
    return round(sum(steps))


def clear(folder: Path) -> None:
    """Remove what a stage left."""
    shutil.rmtree(folder, ignore_errors=True)
