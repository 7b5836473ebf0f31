"""What is done to trainer, agent, server, disk, clock and network while records are on their way: one row a fault.

A fault prepares the stage, then does its harm at moments of chance. What cannot be done on a machine (mounting, network
namespaces) is said, never passed over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.crash_stage import PROCESSES, Stage

DAY_NS = 86_400 * 10**9
HOUR_NS = 3600 * 10**9
DISK_MIB = 256
AGED = "aged"
"""The run whose old records the retention deletes."""


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    moment: Callable[[Stage, random.Random], None]
    """Does the harm once."""
    around: Callable[[Stage], contextlib.AbstractContextManager[None]]
    """Before anything is started, and after all has ended."""
    needs_root: bool = False
    may_lose: bool = False
    """Whether records can be gone for good: then each must be counted."""
    before: Callable[[Stage], None] = lambda stage: None
    """Once everything runs."""
    after: Callable[[Stage], str] = lambda stage: ""
    """Once more while everything runs; what is wrong, or nothing."""


@contextlib.contextmanager
def _nothing(stage: Stage) -> Iterator[None]:
    yield


def killing(*names: str) -> Callable[[Stage, random.Random], None]:
    """kill -9 of all of these at once, and new ones in their place."""

    def moment(stage: Stage, chance: random.Random) -> None:
        time.sleep(chance.uniform(0.05, 1.5))
        stage.kill(*names)
        stage.start(*names)

    return moment


@contextlib.contextmanager
def _small_disk(path: Path) -> Iterator[None]:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=0700", "lens-proof", str(path)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


def _filling(folder: Callable[[Stage], Path]) -> Callable[[Stage, random.Random], None]:
    """The disk is full for a while: written to the last byte, ENOSPC and all."""

    def moment(stage: Stage, chance: random.Random) -> None:
        time.sleep(chance.uniform(0.05, 1.0))
        ballast = folder(stage) / "ballast"
        end = time.monotonic() + chance.uniform(0.3, 2.0)
        with ballast.open("ab", buffering=0) as file:
            while time.monotonic() < end:
                try:
                    file.write(bytes(1 << 20))
                    continue
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                with contextlib.suppress(OSError):
                    file.write(bytes(512))
                time.sleep(0.01)
        ballast.unlink()

    return moment


def _damaging(harm: Callable[[bytearray, random.Random], bytearray]) -> Callable[[Stage, random.Random], None]:
    """While batches wait in the spool and nobody runs who knows them, a file of it is damaged."""

    def moment(stage: Stage, chance: random.Random) -> None:
        stage.kill("server")
        end = time.monotonic() + 10
        while not stage.spooled() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(chance.uniform(0.3, 1.5))
        stage.kill("agent")
        kept = [path for path in stage.spool.glob("*/state.json") if path.stat().st_size]
        for path in (chance.choice(stage.spooled() or kept), *(kept if chance.random() < 0.3 else ())):
            path.write_bytes(harm(bytearray(path.read_bytes()), chance))
        stage.start("server", "agent")

    return moment


def _flip(data: bytearray, chance: random.Random) -> bytearray:
    for _ in range(chance.randint(1, 3)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def _cut_short(data: bytearray, chance: random.Random) -> bytearray:
    return data[: chance.randrange(len(data))]


@contextlib.contextmanager
def _shifted_clock(stage: Stage) -> Iterator[None]:
    stage.shifted = True
    yield


def _clock_jump(stage: Stage, chance: random.Random) -> None:
    stage.shift_file.write_text(str(chance.randint(-HOUR_NS, HOUR_NS)))
    time.sleep(chance.uniform(0.2, 1.5))


@contextlib.contextmanager
def _namespace(stage: Stage) -> Iterator[None]:
    name = f"lens-proof-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        stage.within = ("ip", "netns", "exec", name)
        yield
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def _network_down(stage: Stage, chance: random.Random) -> None:
    time.sleep(chance.uniform(0.05, 1.0))
    link = ["ip", "-n", stage.within[-1], "link", "set", "lo"]
    subprocess.run([*link, "down"], check=True)
    time.sleep(chance.uniform(0.2, 2.5))
    subprocess.run([*link, "up"], check=True)


class Wire:
    """A loopback proxy between agent and server that can be cut at any byte, or made slow."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.delay_s = 0.0
        self.left: int | None = None
        """Bytes, both ways together, until everything is cut."""
        self.cuts = 0
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No more connections."""
        self._listener.close()
        self._cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._stage.port), timeout=5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self._open |= {near, far}
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 14):
                time.sleep(self.delay_s)
                if self.left is not None and self.left < len(data):
                    other.sendall(data[: self.left])
                    self.left, self.cuts = None, self.cuts + 1
                    self._cut()
                    return
                if self.left is not None:
                    self.left -= len(data)
                other.sendall(data)
        for each in (one, other):
            self._open.discard(each)
            each.close()

    def _cut(self) -> None:
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()


_wires: dict[Stage, Wire] = {}


@contextlib.contextmanager
def _wire(stage: Stage) -> Iterator[None]:
    wire = _wires[stage] = Wire(stage)
    stage.via = wire.port
    try:
        yield
    finally:
        _wires.pop(stage).close()


def _mid_message(stage: Stage, chance: random.Random) -> None:
    wire, before = _wires[stage], _wires[stage].cuts
    # Small numbers cut requests and answers alike: the sender cannot know whether the batch was taken.
    wire.left = int(chance.choice((200, 2000, 20_000)) * chance.random())
    end = time.monotonic() + 5
    while wire.cuts == before and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(chance.uniform(0.0, 0.3))


def _slow(stage: Stage, chance: random.Random) -> None:
    wire = _wires[stage]
    wire.delay_s = chance.uniform(0.05, 0.6)
    time.sleep(chance.uniform(0.3, 2.0))
    wire.delay_s = 0.0


def _aged_batch(stage: Stage, first: int, age_ns: int) -> int:
    t_ns = time.time_ns() - age_ns
    rows = [
        {"type": "sample", "metric": "m", "value": 1.0, "rank": 0, "step": step, "t_ns": t_ns}
        for step in range(first, first + 500)
    ]
    body = "\n".join(map(json.dumps, rows)).encode()
    return int(stage.ask("POST", f"/api/v1/runs/{AGED}/records", body, "application/x-ndjson")["accepted"])


def _begin_ageing(stage: Stage) -> None:
    stage.ask("POST", "/api/v1/runs", json.dumps({"run": AGED}).encode())
    rule = {"run": AGED, "keep_s": 86_400}
    stage.ask("PUT", "/api/v1/store/retention", json.dumps(rule).encode())


def _in_upkeep(age: bool) -> Callable[[Stage, random.Random], None]:
    """The server dies while it merges, or deletes what is past its time."""

    def moment(stage: Stage, chance: random.Random) -> None:
        if age:
            first, stage.moments = stage.moments * 1000, stage.moments + 1
            _aged_batch(stage, first, 10 * DAY_NS)
            _aged_batch(stage, first + 500, 0)
        time.sleep(chance.uniform(0.05, 0.8))
        stage.ask("POST", "/api/v1/store/compact", b"")
        time.sleep(chance.uniform(0.0, 0.4))
        stage.kill("server")
        stage.start("server")

    return moment


def _aged_is_right(stage: Stage) -> str:
    """Of the aged run what is old must be gone, what is not must be there."""
    stage.ask("POST", "/api/v1/store/compact", b"")
    while stage.ask("GET", "/api/v1/store/compact")["status"] == "running":
        time.sleep(0.1)
    sql = "SELECT countIf(step % 1000 < 500), countIf(step % 1000 >= 500), uniqExact(step) FROM samples"
    asked = json.dumps({"sql": sql, "run": AGED}).encode()
    old, new, distinct = map(int, stage.ask("POST", "/api/v1/query", asked)["rows"][0])
    wanted = 500 * stage.moments
    return "" if (old, new, distinct) == (0, wanted, wanted) else f"{old} old rows stay, {new} of {wanted} new ones"


def _pairs() -> Iterator[tuple[str, ...]]:
    for index, name in enumerate(PROCESSES):
        yield from ((name, other) for other in PROCESSES[index + 1 :])


def _data(stage: Stage) -> Path:
    return stage.data


def _spool(stage: Stage) -> Path:
    return stage.spool


FAULTS = (
    *(Fault(f"{name} killed", killing(name), _nothing) for name in PROCESSES),
    *(Fault(f"{' and '.join(names)} killed", killing(*names), _nothing) for names in _pairs()),
    Fault("server killed in a compaction", _in_upkeep(False), _nothing),
    Fault(
        "server killed in a retention", _in_upkeep(True), _nothing, before=_begin_ageing, after=_aged_is_right
    ),
    Fault("disk of the spool full", _filling(_spool), lambda stage: _small_disk(stage.spool), needs_root=True),
    Fault("disk of the server full", _filling(_data), lambda stage: _small_disk(stage.data), needs_root=True),
    Fault("spool: bits flipped", _damaging(_flip), _nothing, may_lose=True),
    Fault("spool: a file cut short", _damaging(_cut_short), _nothing, may_lose=True),
    Fault("clock of agent and server jumps by up to an hour", _clock_jump, _shifted_clock),
    Fault("network down", _network_down, _namespace, needs_root=True),
    Fault("connection cut within a message", _mid_message, _wire),
    Fault("network slow, up to 0.6 s a packet", _slow, _wire),
)  # fmt: skip


def cannot(fault: Fault) -> str:
    """Why a fault cannot be made on this machine; nothing when it can."""
    return "needs root" if fault.needs_root and os.geteuid() != 0 else ""
