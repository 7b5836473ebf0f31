"""Faults done to real processes, start to verdict: cause and rank named? how soon? and what does TraceML say of them?

Each case is a training of four ranks on gloo with a real hook, real agents and a real server, and one fault whose
effect is the system's own (`sample_runs.moe.faults`): a signal, a control group, another process, a throttled interface,
a call that is left out. Only the cards are simulated. What ends or stops a run is asked for while it happens, the rest
when the training has ended.

    python benchmarks/real_faults.py [--quick] [--only FAULT ...] [--seeds N] [--traceml VENV/bin/traceml] [--json]
                                     [--keep DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import traceml_says
from stage import RANKS, Run, Stage, p99_step

from lens.cli.processes import wait_until
from sample_runs.moe.faults import Fault

EXPERT_PARALLEL = 2
SEEDS, HEALTHY_SEEDS = 2, 4
RUN_S, VERDICT_S, ASK_S = 240.0, 90.0, 0.5
HANG_S, HANG_STEPS, HEARTBEAT_S = 5.0, 10.0, 1.0
"""A hang is to be named within the larger of 5 s and 10 × p99 step, and one heartbeat."""


@dataclass(frozen=True)
class Kind:
    """One fault. live: it ends or stops the run, so that the verdict is asked for meanwhile."""

    cause: str | None
    steps: int = 120
    onset: int = 40
    words: tuple[str, ...] = ()
    apart: bool = False
    live: bool = False


KINDS = {
    "slow_compute": Kind("slow_device"),
    "thermal": Kind("thermal_throttle", steps=150),
    "hot_expert": Kind("hot_expert", steps=150),
    "collapse": Kind("router_collapse", words=("--experts", "16")),
    "slow_loader": Kind("slow_dataloader"),
    "stop": Kind("process_stopped"),
    "quota": Kind("cpu_quota", steps=150),
    "hog": Kind("cpu_contention", steps=150),
    "link": Kind("slow_link", apart=True),
    "gc": Kind("python_gc", steps=150),
    # Two or more checkpoints behind the onset, one before; memory is read once a second.
    "checkpoint": Kind("checkpoint_stall", steps=250, onset=60),
    "leak": Kind("memory_leak_host", steps=300),
    "nan": Kind("nan_origin", steps=80),
    "worker_death": Kind("dataloader_worker_death", live=True),
    "killed": Kind("rank_dead", live=True),
    "shape": Kind("collective_mismatch", live=True),
    "skip": Kind("collective_mismatch", live=True),
    "stuck": Kind("rank_stuck", live=True),
    "healthy": Kind(None),
}


@dataclass(frozen=True)
class Case:
    """One run: a fault on a rank with a seed, or nothing."""

    name: str
    rank: int
    seed: int

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def fault(self) -> Fault | None:
        """What is done to the run."""
        return None if self.kind.cause is None else Fault.parse(f"{self.name}@{self.kind.onset}:{self.rank}")

    @property
    def ranks(self) -> list[int]:
        """What a right verdict names."""
        return self.fault.ranks(RANKS, EXPERT_PARALLEL) if self.fault else []

    @property
    def words(self) -> list[str]:
        """What the training is told."""
        fault = [] if self.fault is None else ["--fault", f"{self.name}@{self.kind.onset}:{self.rank}"]
        return ["--steps", str(self.kind.steps), "--seed", str(self.seed), *self.kind.words, *fault]


@dataclass(frozen=True)
class Result:
    """What came of a case. late: steps or seconds until it was named. told: the sentence."""

    case: Case
    status: str
    causes: list[str]
    ranks: list[int]
    late_steps: int | None = None
    late_s: float | None = None
    bound_s: float | None = None
    told: str = ""
    traceml: str = ""

    @property
    def right_cause(self) -> bool:
        """Whether the verdict names the cause; of a healthy run, whether it is called so."""
        if self.case.fault is None:
            return self.status == "healthy"
        return self.causes[:1] == [self.case.kind.cause]

    @property
    def right_ranks(self) -> bool:
        """Whether it names the ranks too."""
        return self.right_cause and (self.case.fault is None or self.ranks == self.case.ranks)

    @property
    def in_time(self) -> bool | None:
        """Whether a hang was named in time; None of other cases."""
        return None if self.bound_s is None or self.late_s is None else self.late_s <= self.bound_s


def cases(names: Sequence[str], seeds: int) -> list[Case]:
    """All cases of some faults; the rank moves on with fault and seed."""
    return [
        Case(name, (place + seed) % RANKS, seed)
        for place, name in enumerate(KINDS)
        if name in names
        for seed in range(seeds if KINDS[name].cause else seeds * HEALTHY_SEEDS // SEEDS)
    ]


def judged(stage: Stage, case: Case) -> Result:
    """Run a case and ask for the verdict."""
    cards = ["H200"] * (RANKS if case.kind.apart else 2)
    with stage.run(case.words, cards, case.kind.apart) as run:
        if case.kind.live:
            return _while_it_happens(run, case)
        if not run.wait(RUN_S):
            return _result(case, {"status": "did not end"})
        run.settle()
        # A busy server may not answer at once.
        wait_until(lambda: bool(run.verdict()), VERDICT_S)
        return _result(case, run.verdict())


def _while_it_happens(run: Run, case: Case) -> Result:
    """Ask until the right verdict comes, or patience ends."""
    end = time.monotonic() + RUN_S
    while (began := run.began()) is None:
        if time.monotonic() > end or (run.wait(0) and run.began() is None):
            return _result(case, {"status": "never began"})
        time.sleep(0.05)
    p99 = p99_step(run)
    bound = None if p99 is None else max(HANG_S, HANG_STEPS * p99) + HEARTBEAT_S
    result = _result(case, {"status": "no verdict"})
    while time.time() - began[1] < VERDICT_S:
        result = _result(case, run.verdict(), time.time() - began[1], bound)
        if result.right_ranks:
            break
        time.sleep(ASK_S)
    if not result.right_ranks:
        return result
    # Which call it is shows once every rank has said where it stands.
    time.sleep(3 * HEARTBEAT_S)
    return _result(case, run.verdict(), result.late_s, bound)


def _result(case: Case, reply: dict[str, Any], late_s: float | None = None, bound_s: float | None = None) -> Result:
    found = [item for item in reply.get("hypotheses", []) if item["severity"] != "info"]
    first: dict[str, Any] = found[0] if found else {"ranks": [], "recommendation": "", "detected_step": None}
    leading: dict[int, str] = {}
    for item in found:
        leading.setdefault(item["finding"], item["cause"])
    named = case.fault and first["detected_step"] is not None and late_s is None
    late = max(0, first["detected_step"] - case.kind.onset) if named else None
    status = str(reply.get("status", "no verdict"))
    bound_s = bound_s if status == "hung" else None
    return Result(
        case, status, list(leading.values()), first["ranks"], late, late_s, bound_s, first["recommendation"]
    )


def main() -> int:
    """Run the cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, five faults")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="FAULT")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--traceml", type=Path, metavar="COMMAND", help="its command, in an environment of its own")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the data folder and the logs there")
    parser.add_argument("--out", type=Path, help="write the tables there too")
    chosen = parser.parse_args()
    names = ["stop", "quota", "worker_death", "skip", "healthy"] if chosen.quick else chosen.only
    began, results = time.monotonic(), []
    print(HEAD)
    with Stage.opened(chosen.keep) as stage:
        for case in cases(names, 1 if chosen.quick else chosen.seeds):
            results.append(judged(stage, case))
            print(row(results[-1]), flush=True)
    peers = {}
    if chosen.traceml:
        for name in names:
            case = cases([name], 1)[0]
            peers[name] = traceml_says.of(chosen.traceml, case.words, case.kind.apart, case.kind.live)
            print(f"TraceML of {name}: {peers[name]}", flush=True)
    minutes = (time.monotonic() - began) / 60
    text = document(results, peers, minutes)
    if chosen.out:
        chosen.out.write_text(text)
    counted = {
        "cases": len(results), "cause_right": sum(one.right_cause for one in results),
        "cause_and_ranks_right": sum(one.right_ranks for one in results),
        "hangs": sum(one.bound_s is not None for one in results), "hangs_in_time": sum(bool(one.in_time) for one in results),
        "minutes": round(minutes, 1),
    }  # fmt: skip
    print(json.dumps(counted) if chosen.json else f"\n{counted}")
    return 0 if counted["cause_and_ranks_right"] == len(results) else 1


HEAD = "| done to the run | rank | seed | status | first named | ranks named | until named | |\n|---|---|---|---|---|---|---|---|"


def row(one: Result) -> str:
    """A case for people."""
    case = one.case
    late = "" if one.late_steps is None else f"{one.late_steps} steps"
    if one.late_s is not None:
        late = f"{one.late_s:.1f} s" + ("" if one.bound_s is None else f" (bound {one.bound_s:.1f} s)")
    mark = "right" if one.right_ranks else "cause right, ranks WRONG" if one.right_cause else "WRONG"
    if one.in_time is False:
        mark += ", LATE"
    others = f" (also {', '.join(one.causes[1:])})" if one.causes[1:] else ""
    cells = [
        case.name, ", ".join(map(str, case.ranks)) or "-", str(case.seed), one.status,
        (one.causes[0] + others) if one.causes else "-", ", ".join(map(str, one.ranks)) or "-", late, mark,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def document(results: Sequence[Result], peers: dict[str, str], minutes: float) -> str:
    """The tables with how they were made."""
    words = [*sys.argv[1:], ""]
    # Paths are of this machine and say nothing.
    pathless = [
        a
        for a, before in zip(words, ["", *words], strict=False)
        if not {a, before} & {"--out", "--keep", "--traceml"}
    ]
    command = shlex.join(["python", "benchmarks/real_faults.py", *filter(None, pathless)])
    faulty = [one for one in results if one.case.fault]
    calm = [one for one in results if not one.case.fault]
    hangs = [one for one in results if one.bound_s is not None]
    lines = [
        "# Faults done to real processes", "",
        "Each row is a training of four ranks on gloo with a real hook, real agents and a real server. The effect of each",
        "fault is the system's own: a signal, a control group's quota, a busy process on the same core, a throttled",
        "interface (`tc tbf` in a network namespace), a call that is left out. Only cards are simulated. `rank` is where the",
        "fault was put; steps and seconds count from there.", "",
        f"Made on {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[2]:.1f}, in {minutes:.0f} minutes: `{command}`", "",
        f"**Cause named first in {sum(one.right_cause for one in faulty)} of {len(faulty)}, cause and exact ranks in "
        f"{sum(one.right_ranks for one in faulty)}; {sum(one.right_cause for one in calm)} of {len(calm)} healthy runs called "
        f"healthy; {sum(bool(one.in_time) for one in hangs)} of {len(hangs)} hangs named in time.**", "",
        HEAD, *map(row, results), "",
    ]  # fmt: skip
    told = {one.case.name: one.told for one in results if one.case.kind.live and one.told}
    if told:
        lines += ["## What is said of runs that ended or stood still", ""]
        lines += ["| done to the run | said |", "|---|---|"]
        lines += [f"| {name} | {text} |" for name, text in told.items()] + [""]
    if peers:
        lines += traceml_says.section(peers, {one.case.name: row_of(one) for one in reversed(results)})
    return "\n".join(lines) + "\n"


def row_of(one: Result) -> tuple[str, str]:
    """Where the fault was, and verdict and ranks, in cells."""
    where = ", ".join(map(str, one.case.ranks)) or "-"
    ranks = f" ({', '.join(map(str, one.ranks))})" if one.ranks else ""
    return where, (one.causes[0] if one.causes else one.status) + ranks


if __name__ == "__main__":
    sys.exit(main())
