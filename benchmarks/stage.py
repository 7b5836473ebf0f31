"""A stage for real runs: one server, and for each run its agents and four ranks, all real; only cards are simulated."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lens.cli.errors import CommandError
from lens.cli.processes import start, stop, wait_until
from lens.cli.reader import ServerReader
from lens.cli.run import new_run_id
from lens.reading.connection import owner_of
from lens.settings import Settings

RANKS = 4
PATIENCE_S = 120.0
BEGAN = re.compile(r"^fault (\w+) on rank (\d+) at step (\d+), ([\d.]+)", re.MULTILINE)


@dataclass
class Stage:
    """A server with an empty data folder."""

    folder: Path
    server: subprocess.Popen[Any]
    reader: ServerReader

    @classmethod
    @contextlib.contextmanager
    def opened(cls, keep: Path | None = None) -> Iterator[Stage]:
        """Start it; end it afterwards. keep: where data and logs are left; else they are removed."""
        folder = keep or Path(tempfile.mkdtemp(prefix="lens-stage-"))
        data = folder / "data"
        serve = [sys.executable, "-m", "lens", "serve", "--data", str(data), "--port", "0"]
        # Rings of its own: a server takes in what it finds of other runs.
        server = start(serve, {"LENS_RINGS": str(folder / "none")}, folder / "server.log")
        try:
            if not wait_until(lambda: owner_of(data) is not None, PATIENCE_S, server):
                raise SystemExit(f"no server: {(folder / 'server.log').read_text()[-2000:]}")
            url = str((owner_of(data) or {})["url"])
            yield cls(folder, server, ServerReader(url, Settings.load(data=data).read_token()))
        finally:
            stop(server, first=signal.SIGINT)
            if keep is None:
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def run(self, words: Sequence[str], cards: Sequence[str], apart: bool = False) -> Iterator[Run]:
        """A run of the sample training with these words, its ranks dealt out over one host a card.

        apart: every rank is in a network namespace of its own, with an interface of its own (needs root).
        """
        run = Run(self, new_run_id(), Path(tempfile.mkdtemp(prefix="lens-rings-", dir="/dev/shm")))
        with contextlib.ExitStack() as after:
            after.callback(run.end)
            run.agents = [
                run.start_agent(f"host{number}", f"{card}:{RANKS // len(cards)}")
                for number, card in enumerate(cards)
            ]
            training = [
                "-m", "sample_runs.moe", "--hosts", str(len(cards)), "--card", ",".join(cards), "--print-every", "0",
                "--out", str(run.rings / "out"), *words,
            ]  # fmt: skip
            if apart:
                names = after.enter_context(namespaces(RANKS))
                run.ranks = [run.start_rank(training, rank, name) for rank, name in enumerate(names)]
            else:
                launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
                run.ranks = [run.start_training([sys.executable, *launcher, *training], {})]
            yield run


@dataclass
class Run:
    """One run on a stage."""

    stage: Stage
    name: str
    rings: Path
    agents: list[subprocess.Popen[Any]] = field(default_factory=list)
    ranks: list[subprocess.Popen[Any]] = field(default_factory=list)
    """What was started: a launcher, or the ranks themselves."""

    @property
    def log(self) -> Path:
        """What the training wrote."""
        return self.stage.folder / f"{self.name}.log"

    def start_agent(self, host: str, card: str) -> subprocess.Popen[Any]:
        """The agent of one host that is played."""
        command = [sys.executable, "-m", "lens", "agent", "--simulate", card]
        log = self.stage.folder / f"{self.name}-{host}.log"
        return start(command, {**self._environment(), "LENS_HOST": host, "LENS_AGENT_LINGER": "3600"}, log)

    def start_rank(self, training: Sequence[str], rank: int, namespace: str) -> subprocess.Popen[Any]:
        """One rank in a namespace."""
        place = {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS), "MASTER_ADDR": address(0), "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": INTERFACE,
        }  # fmt: skip
        return self.start_training(["ip", "netns", "exec", namespace, sys.executable, *training], place)

    def start_training(self, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[Any]:
        """Start a launcher or a rank."""
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TMPDIR": str(self.rings)}
        return start(command, {**quiet, **self._environment(), **environment}, self.log)

    def wait(self, seconds: float) -> bool:
        """Whether the training came to its end in time."""
        return wait_until(lambda: all(one.poll() is not None for one in self.ranks), seconds)

    def began(self) -> tuple[int, float] | None:
        """Step and Unix time at which its fault began, by its own word."""
        found = BEGAN.search(self.log.read_text(errors="replace")) if self.log.exists() else None
        return (int(found[3]), float(found[4])) if found else None

    def settle(self) -> None:
        """Wait until all that the ranks recorded has arrived."""
        wait_until(lambda: not self._living_rings(), PATIENCE_S)
        wait_until(lambda: self._known().get("state") == "ended", PATIENCE_S)

    def verdict(self) -> dict[str, Any]:
        """The server's verdict; empty while it knows nothing of the run."""
        try:
            return self.stage.reader.diagnosis(self.name)
        except CommandError:
            return {}

    def end(self) -> None:
        """End whatever is left of it, and remove its rings."""
        # A launcher asks its ranks to end and waits; who hangs does not answer, so that they are ended first.
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for one in (*self.ranks, *self.agents):
            stop(one)
        shutil.rmtree(self.rings, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        return {
            "LENS_RUN": self.name, "LENS_DATA": str(self.stage.folder / "data"), "LENS_RINGS": str(self.rings),
            "LENS_SHIP_S": "0.25", "LENS_AGENT": "0", "LENS_MAX_OVERHEAD_PCT": "20",
            "LENS_SERVER": self.stage.reader.url,
        }  # fmt: skip

    def _pids(self) -> list[int]:
        """Ranks and their loaders that still live."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = f"LENS_RUN={self.name}".encode() in (folder / "environ").read_bytes().split(b"\0")
                words = (folder / "cmdline").read_bytes()
                if mine and b"sample_runs.moe" in words and b"torch.distributed.run" not in words:
                    found.append(int(folder.name))
        return found

    def _living_rings(self) -> list[Path]:
        return [path for path in self.rings.rglob("about.json") if '"role": "trainer"' in path.read_text()]

    def _known(self) -> dict[str, Any]:
        try:
            return self.stage.reader.run(self.name)
        except CommandError:
            return {}


INTERFACE = "lens0"


def address(number: int) -> str:
    """Address of a rank's interface."""
    return f"10.87.{number}.2"


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[str]]:
    """Network namespaces, each with one interface; one more between them routes as a switch would.

    Raises:
        SystemExit: they cannot be made here.
    """
    stem = f"lens-{os.getpid()}"
    switch, names = f"{stem}-switch", [f"{stem}-{number}" for number in range(count)]
    made: list[str] = []
    try:
        for name in (switch, *names):
            _ip("netns", "add", name)
            made.append(name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("netns", "exec", switch, "sysctl", "-q", "net.ipv4.ip_forward=1")
        for number, name in enumerate(names):
            port = f"port{number}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _ip("-n", switch, "addr", "add", f"10.87.{number}.1/24", "dev", port)
            _ip("-n", switch, "link", "set", port, "up")
            _ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "route", "add", "default", "via", f"10.87.{number}.1")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"no network namespace here: ip {' '.join(words)}: {done.stderr.strip()}")


def p99_step(run: Run) -> float | None:
    """99th percentile of the steps' durations, seconds; None without steps."""
    sql = f"SELECT quantileExact(0.99)(duration_s) FROM steps WHERE run = '{run.name}' AND step > 1"
    rows = run.stage.reader.sql_reply(sql, run.name)["rows"]
    return None if not rows or rows[0][0] is None else float(rows[0][0])
