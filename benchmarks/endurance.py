"""A long training while what watches it is killed, cut off and left without a disk: does it ever stop, or go slower?

Four real ranks of the sample training under one agent and one server. Meanwhile the agent is killed and stays away, the
server is killed and stays away, the disk of spool and store is full to the last byte, and agent and server are killed
together; each time what was killed is started again. The training notes the time of each of its steps itself, so that
steps are compared within the run: those under each disturbance with those of the calm between. Beside it the same
training runs without lens, before and after.

    python benchmarks/endurance.py [--minutes 10] [--json] [--out FILE]      # needs root: it mounts a small disk

Nothing that the server has once answered with may be gone at the end. The rings are small, so that they do run over while
no agent reads them, and what is missing must have been counted: what a server started afresh says of the run's drops is
compared with what the ranks wrote and the store lacks (`Missing`).
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import math
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
AGREES = 0.02
"""What of the slots missing may be uncounted, or counted and not missing, beside the steps that are lost in part."""
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
OVER_STEPS = 900
"""Steps at least in which no agent reads: in fewer, a ring does not run over, and a short try has nothing to count."""
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
        self.drops: dict[str, int | None] = {}
        """What the API says of it then: see `Query.run`."""
        self.collectives = 0
        """Slots of collectives that the store holds then."""
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
        finally:
            query.close()
        self.start("server")
        self.drops = self.ask("GET", f"/api/v1/runs/{RUN}")["drops"]
        table, given = tables.collectives, tables.vectors["metric"] == tables.code("comm.given.bytes")
        # Each takes a slot, and so does what an all-to-all gives to each rank; one that is sent while open comes twice.
        begun = set(zip(table["rank"].tolist(), table["t0_ns"].tolist(), table["seq"].tolist(), strict=True))
        self.collectives = len(begun) + int(given.sum())
        found = Counter(zip(tables.steps["rank"].tolist(), tables.steps["step"].tolist(), strict=True))
        self.kept = set(found)
        recorded = {(rank, step) for rank in range(RANKS) for step in range(len(self.read(rank).marks) - 1)}
        return Outcome(
            recorded=len(recorded), stored=sum(found.values()), lost=len(recorded - self.kept),
            doubled=sum(found.values()) - len(found), wrong=len(self.kept - recorded), waiting=waiting,
            counted=sum(count or 0 for count in self.drops.values()), damaged=total(tables, "lens.spool.corrupt"),
        )  # fmt: skip

    def read(self, rank: int) -> Times:
        """What a rank has noted."""
        return Times.read(self.times / f"{rank}.times")

    def slots(self) -> dict[str, int]:
        """Slots that all ranks have written, by ring: see `benchmarks.timed_moe.written`."""
        counts: Counter[str] = Counter()
        for rank in range(RANKS):
            counts.update(json.loads((self.times / f"{rank}.slots").read_text()))
        return dict(counts)

    def stored(self) -> dict[int, tuple[int, int]]:
        """Rank -> steps that the server has answered with so far, and the last of them."""
        body = {"sql": f"SELECT rank, count() AS n, max(step) AS last FROM steps WHERE run = '{RUN}' GROUP BY rank"}
        rows = self.ask("POST", "/api/v1/query", json.dumps(body).encode())["rows"]
        return {int(rank): (int(count), int(last)) for rank, count, last in rows}


class Missing(NamedTuple):
    """Slots that the ranks wrote and the store lacks."""

    of_collectives: int
    """In the rings of the collectives: written, less those that are stored."""
    of_steps: int
    """In the ranks' own rings, where a row of numbers is no more to be told from several: the missing steps, times the
    slots that a step takes there."""

    @classmethod
    def of(cls, written: dict[str, int], outcome: Outcome, collectives: int) -> Missing:
        """From what was written, by ring, the steps that are missing, and the slots of collectives that are stored."""
        alone = written["native"]
        a_step = written["main"] / outcome.recorded
        return cls(alone - collectives if alone else 0, round(outcome.lost * a_step))


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
        least = len(stage.read(0).marks) + OVER_STEPS if "agent" in away else 0
        while (now := time.monotonic()) < began + part * seconds or (
            now < began + PATIENCE_S and len(stage.read(0).marks) < least
        ):
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
            missing = Missing.of(stage.slots(), outcome, stage.collectives)
    after = without_lens(beside_s)
    beside = {"before": statistics.median(before), "after": statistics.median(after)}
    return {
        "minutes": minutes,
        "exit_code": code,
        "recorded_steps": outcome.recorded,
        "stored_steps": outcome.stored,
        "missing_steps": outcome.lost,
        "missing_slots": missing._asdict(),
        "drops": stage.drops,
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
    beside, drops, missing = found["step_ms_without_lens"], found["drops"], found["missing_slots"]
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
        f"doubled {found['doubled']}. Slots that the ranks wrote and the store lacks: {missing['of_collectives']} of collectives, and",
        f"{missing['of_steps']} as the missing steps take them. The API says of the run: {drops['lost_slots']} overwritten",
        f"unread, {drops['given_up']} given up by the spool, {drops['rejected']} refused: {counted_of_missing(found):.3f} of these.",
        f"Of {found['answers']} answers of the server, steps told of and gone at the end: {found['answered_then_lost']}. Exit code",
        f"of the training: {found['exit_code']}. Ended without being killed: {', '.join(found['restarted']) or 'nothing'}.",
    ]
    return lines


def slower(found: dict[str, Any]) -> float:
    """How much longer than the calm around it the slowest disturbance is, beyond what calms differ among themselves."""
    calm = [abs(row["ratio"] - 1) for row in found["spans"] if row["span"] == CALM]
    names = {away.name for away in PLAN}
    return max(row["ratio"] for row in found["spans"] if row["span"] in names) - 1 - max(calm)


def counted_of_missing(found: dict[str, Any]) -> float:
    """Slots that the store says it lacks, over those that it does lack; not a number where it lacks none."""
    missing = sum(found["missing_slots"].values())
    return sum(count or 0 for count in found["drops"].values()) / missing if missing else math.nan


def agree(found: dict[str, Any]) -> bool:
    """Whether steps are missing, and what the store says is missing is what is."""
    # A ring runs over in the middle of a step, at both ends of what is lost.
    off = AGREES + 2 * RANKS * len(PLAN) / max(1, found["missing_steps"])
    return found["missing_steps"] > 0 and abs(counted_of_missing(found) - 1) <= off


def holds(found: dict[str, Any]) -> bool:
    """Whether the training ran through and no slower, nothing answered is lost, and what is missing is counted."""
    wrong = ("exit_code", "doubled", "never_recorded", "batches_waiting", "answered_then_lost", "restarted")
    return agree(found) and slower(found) <= BUDGET and not any(found[key] for key in wrong)


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
