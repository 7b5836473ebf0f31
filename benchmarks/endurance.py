"""A long training while what watches it is killed, cut off and left without a disk: does it ever stop, or go slower?

Four real ranks of the sample training under one agent and one server. Meanwhile the agent is killed and stays away, the
server is killed and stays away, the disk of spool and store is full to the last byte, and agent and server are killed
together; each time what was killed is started again. The training notes the time of each of its steps itself, so that
steps are compared within the run: those under each disturbance with those of the calm between. Beside it the same
training runs without lens, before and after.

    python benchmarks/endurance.py [--minutes 10] [--json] [--out FILE]      # needs root: it mounts a small disk

Nothing that the server has once answered with may be gone at the end, and what is missing must have been counted. The
rings are small, so that they do run over while no agent reads them: that something was lost, and was counted, is shown.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.crash_stage import RUN, Outcome, Stage, total

ROOT = Path(__file__).resolve().parents[1]
RANKS, DISK_MIB, ASK_S, WARM_S, PATIENCE_S = 4, 1024, 5.0, 10.0, 180.0
RING_MIB = 1
"""Of a rank; 8 by default."""
BUDGET = 0.01
"""Part of a step that the hook may take by its default."""
CALM = "calm"


class Away(NamedTuple):
    """A disturbance."""

    name: str
    lasts: float
    """Part of the run."""
    killed: tuple[str, ...]
    """Processes killed at its beginning and started at its end; none: the disk is full meanwhile."""


PLAN = (
    Away("the agent is away", 0.1, ("agent",)),
    Away("the server is away", 0.1, ("server",)),
    Away("the disk is full", 0.1, ()),
    Away("agent and server are away", 0.06, ("agent", "server")),
)
CALM_LASTS, AFTER_LASTS = 0.1, 0.035
"""Parts of the run: each calm, and each time after a disturbance."""


@dataclass
class Times:
    """When each step of a rank began, ns, and when the last one ended."""

    marks: array[int]

    @classmethod
    def read(cls, path: Path) -> Times:
        """What one rank has noted."""
        marks = array("q")
        marks.frombytes(path.read_bytes())
        return cls(marks)

    def within(self, begins: float, ends: float) -> list[float]:
        """Lengths of the steps that lie in these seconds, ms."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [(t1 - t0) / 1e6 for t0, t1 in pairs if begins * 1e9 <= t0 and t1 <= ends * 1e9]


class Endurance(Stage):
    """The stage of the proofs of delivery, with a real training on it."""

    def __init__(self, folder: Path, disk: Path) -> None:
        super().__init__(folder)
        self.kept: set[tuple[int, int]] = set()
        """(rank, step) that the store holds at the end."""
        self.data, self.spool, self.times = disk / "data", disk / "spool", folder / "times"
        for path in (self.data, self.spool, self.times):
            path.mkdir(mode=0o700, exist_ok=True)
        self.environment |= {"LENS_DATA": str(self.data), "LENS_SPOOL": str(self.spool), "LENS_SHIP_S": "1"}
        self.environment |= {"LENS_RING_MIB": str(RING_MIB), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def _start_trainer(self) -> subprocess.Popen[Any]:
        return self._popen(training(self.times, self.times.parent))

    def _compare(self, waiting: int) -> Outcome:
        from lens.store.query import Query

        query = Query.open_folder(self.data)
        try:
            _, tables = query.tables(RUN)
            drops = query.run(RUN)["drops"]
        finally:
            query.close()
        found = Counter(zip(tables.steps["rank"].tolist(), tables.steps["step"].tolist(), strict=True))
        self.kept = set(found)
        recorded = {(rank, step) for rank in range(RANKS) for step in range(len(self.read(rank).marks) - 1)}
        return Outcome(
            recorded=len(recorded), stored=sum(found.values()), lost=len(recorded - self.kept),
            doubled=sum(found.values()) - len(found), wrong=len(self.kept - recorded), waiting=waiting,
            counted=drops["lost_slots"] + drops["given_up"], damaged=total(tables, "lens.spool.corrupt"),
        )  # fmt: skip

    def read(self, rank: int) -> Times:
        """What a rank has noted."""
        return Times.read(self.times / f"{rank}.times")

    def stored(self) -> dict[int, tuple[int, int]]:
        """Rank -> steps that the server has answered with so far, and the last of them."""
        body = {"sql": f"SELECT rank, count() AS n, max(step) AS last FROM steps WHERE run = '{RUN}' GROUP BY rank"}
        rows = self.ask("POST", "/api/v1/query", json.dumps(body).encode())["rows"]
        return {int(rank): (int(count), int(last)) for rank, count, last in rows}


def training(times: Path, out: Path, *more: str) -> list[str]:
    """The command of four ranks that train until they are asked to stop."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    words = ["--steps", "1000000", "--print-every", "0", "--out", str(out / "out")]
    return [*launcher, str(ROOT / "benchmarks" / "timed_moe.py"), str(times), *words, *more]


def stop(child: subprocess.Popen[Any], times: Path) -> int:
    """Ask one rank to stop; all end after the same step. The exit code of the launcher."""
    os.kill(int((times / "0.pid").read_text()), signal.SIGTERM)
    return child.wait(PATIENCE_S)


def wait_for_steps(times: Path, child: subprocess.Popen[Any]) -> None:
    """Until the ranks train."""
    end = time.monotonic() + PATIENCE_S
    while not all((times / f"{rank}.times").exists() for rank in range(RANKS)):
        if child.poll() is not None or time.monotonic() > end:
            raise SystemExit("the training did not begin")
        time.sleep(0.2)


def without_lens(seconds: float) -> list[float]:
    """Lengths of the steps of the same training without lens, ms."""
    with tempfile.TemporaryDirectory() as place:
        times = Path(place)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            training(times, times, "--no-lens"), env=environment, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for_steps(times, child)
            began = time.monotonic()
            time.sleep(WARM_S + seconds)
            if stop(child, times):
                raise SystemExit("the training without lens failed")
        finally:
            child.kill()
        return Times.read(times / "0.times").within(began + WARM_S, began + WARM_S + seconds)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A disk of its own, mounted here."""
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=0700", "lens-proof", str(path)]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        raise SystemExit("a small disk cannot be mounted here: run it as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


@contextlib.contextmanager
def full(disk: Path) -> Iterator[Callable[[], None]]:
    """Nothing fits on it any more; calling what is given fills what has become free since."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:

        def fill() -> None:
            for size in (1 << 20, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))

        fill()
        try:
            yield fill
        finally:
            file.truncate(0)
    ballast.unlink()


@dataclass
class Found:
    """What came of it."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)
    """(what was done, from, to), seconds of the monotonic clock."""
    answered: list[dict[int, tuple[int, int]]] = field(default_factory=list)
    """See `Endurance.stored`, every few seconds."""
    restarted: list[str] = field(default_factory=list)
    """What ended without being killed, and when."""


def disturbed(stage: Endurance, disk: Path, seconds: float) -> Found:
    """Follow the plan: calm, a disturbance, the time after it, and so on; calm at the end."""
    found = Found()
    asked = time.monotonic()

    def go_on(
        name: str, part: float, away: Sequence[str] = (), meanwhile: Callable[[], None] | None = None
    ) -> None:
        nonlocal asked
        began = time.monotonic()
        while (now := time.monotonic()) < began + part * seconds:
            if meanwhile is not None:
                meanwhile()
            _keep_running(stage, found, away)
            if now - asked > ASK_S and "server" not in away:
                asked = now
                # Busy, or its disk is full: it is asked again.
                with contextlib.suppress(OSError, KeyError, ValueError):
                    found.answered.append(stage.stored())
            time.sleep(0.25)
        found.spans.append((name, began, time.monotonic()))

    time.sleep(WARM_S)
    for away in PLAN:
        go_on(CALM, CALM_LASTS)
        if away.killed:
            stage.kill(*away.killed)
            go_on(away.name, away.lasts, away.killed)
            # The server first, as an agent waits for nobody.
            stage.start(*reversed(away.killed))
        else:
            with full(disk) as fill:
                go_on(away.name, away.lasts, (), fill)
        go_on(f"after: {away.name}", AFTER_LASTS)
    go_on(CALM, CALM_LASTS)
    return found


def _keep_running(stage: Endurance, found: Found, away: Sequence[str]) -> None:
    """Whoever ends without being killed is noted and started again, as a supervisor would; but for the training."""
    if stage.running["trainer"].poll() is not None:
        raise SystemExit(f"the training ended: {Path(stage.log.name).read_text(errors='replace')[-2000:]}")
    for name in ("server", "agent"):
        code = stage.running[name].poll()
        if code is not None and name not in away:
            found.restarted.append(f"the {name} ended by itself (exit code {code})")
            stage.start(name)


def measure(minutes: float) -> dict[str, Any]:
    """All that is told of it."""
    beside_s = max(20.0, minutes * 6)
    before = without_lens(beside_s)
    with tempfile.TemporaryDirectory(prefix="lens-endurance-") as place:
        folder = Path(place)
        with small_disk(folder / "disk"):
            stage = Endurance(folder, folder / "disk")
            try:
                stage.start("server", "agent", "trainer")
                wait_for_steps(stage.times, stage.running["trainer"])
                found = disturbed(stage, folder / "disk", minutes * 60)
                code = stop(stage.running["trainer"], stage.times)
                outcome = stage.finish()
            finally:
                stage.end()
            times = [stage.read(rank) for rank in range(RANKS)]
    after = without_lens(beside_s)
    beside = {"before": statistics.median(before), "after": statistics.median(after)}
    return {
        "minutes": minutes,
        "exit_code": code,
        "recorded_steps": outcome.recorded,
        "stored_steps": outcome.stored,
        "missing_steps": outcome.lost,
        "counted_lost_slots": outcome.counted,
        "doubled": outcome.doubled,
        "never_recorded": outcome.wrong,
        "batches_waiting": outcome.waiting,
        "answers": len(found.answered),
        "answered_then_lost": answered_then_lost(found.answered, stage.kept),
        "restarted": found.restarted,
        "step_ms_without_lens": beside,
        "spans": compared(found.spans, times[0]),
    }


def answered_then_lost(answers: Sequence[dict[int, tuple[int, int]]], kept: set[tuple[int, int]]) -> int:
    """The most steps of a rank that an answer had told of, and the store no longer has at the end."""
    by_rank = {rank: sorted(step for other, step in kept if other == rank) for rank in range(RANKS)}
    gone = (
        count - bisect.bisect_right(by_rank[rank], last)
        for answer in answers
        for rank, (count, last) in answer.items()
    )
    return max((0, *gone))


def compared(spans: Sequence[tuple[str, float, float]], times: Times) -> list[dict[str, Any]]:
    """Each span's steps against the calm ones around it, in order: what drifts on a machine is not the fault's."""
    calm = [statistics.median(times.within(begins, ends)) for name, begins, ends in spans if name == CALM]
    rows, passed = [], 0
    for name, begins, ends in spans:
        steps = times.within(begins, ends)
        middle = statistics.median(steps)
        around = calm[max(0, passed - 1) : passed + 1]
        passed += name == CALM
        rows.append(
            {
                "span": name, "seconds": ends - begins, "steps": len(steps), "median_ms": middle,
                "p99_ms": sorted(steps)[int(len(steps) * 0.99)], "longest_ms": max(steps),
                "ratio": middle / statistics.fmean(around),
            }
        )  # fmt: skip
    return rows


def table(found: dict[str, Any]) -> list[str]:
    """Markdown."""
    beside = found["step_ms_without_lens"]
    lines = [
        "| | seconds | steps | median step, ms | of the calm around it | p99, ms | longest, ms |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found["spans"]:
        cells = [
            row["span"],
            f"{row['seconds']:.0f}",
            str(row["steps"]),
            f"{row['median_ms']:.1f}",
            f"{row['ratio']:.3f}",
        ]
        cells += [f"{row['p99_ms']:.1f}", f"{row['longest_ms']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Without lens, server and agent: {beside['before']:.1f} ms before, {beside['after']:.1f} ms after.",
        "",
        f"{found['recorded_steps']} steps of {RANKS} ranks; stored {found['stored_steps']}, missing {found['missing_steps']},",
        f"doubled {found['doubled']}. Slots counted as lost, and shown with the run: {found['counted_lost_slots']}. Of",
        f"{found['answers']} answers of the server, steps told of and gone at the end: {found['answered_then_lost']}. Exit code",
        f"of the training: {found['exit_code']}. Ended without being killed: {', '.join(found['restarted']) or 'nothing'}.",
    ]
    return lines


def slower(found: dict[str, Any]) -> float:
    """How much longer than the calm around it the slowest disturbance is, beyond what calms differ among themselves."""
    calm = [abs(row["ratio"] - 1) for row in found["spans"] if row["span"] == CALM]
    names = {away.name for away in PLAN}
    return max(row["ratio"] for row in found["spans"] if row["span"] in names) - 1 - max(calm)


def holds(found: dict[str, Any]) -> bool:
    """Whether the training ran through and no slower, nothing answered is lost, and what is missing, which is something,
    was counted."""
    wrong = ("exit_code", "doubled", "never_recorded", "batches_waiting", "answered_then_lost", "restarted")
    told_of = 0 < found["missing_steps"] <= found["counted_lost_slots"]
    return told_of and slower(found) <= BUDGET and not any(found[key] for key in wrong)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of the watched run (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--out", type=Path, help="write the proof here")
    options = parser.parse_args()
    found = measure(options.minutes)
    lines = table(found)
    print("\n".join(lines))
    if options.out:
        head = [
            "# A long training, disturbed", "",
            f"`python benchmarks/endurance.py --minutes {options.minutes:g}`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, "
            f"{os.cpu_count()} cores, load {os.getloadavg()[2]:.1f} at the end. {RANKS} real ranks of the sample training on them, with an",
            "agent and a server beside. Away is `kill -9`, full is a disk of its own, written to the last byte, that holds spool and",
            f"store. Rings of {RING_MIB} MiB (8 by default) run over while no agent reads them. *After* is the time in which what had",
            "been kept is caught up with.", "",
        ]  # fmt: skip
        options.out.write_text(
            "\n".join([*head, f"**{'Holds' if holds(found) else 'Does not hold'}.**", "", *lines, ""])
        )
    if options.json:
        print(json.dumps(found))
    return 0 if holds(found) else 1


if __name__ == "__main__":
    sys.exit(main())
