"""Real runs with real faults, start to verdict: is the right cause named first, on the right ranks?

Each case is one `lens demo --exit` in a data folder of its own: trainer, agents, server and diagnosis are the real
ones. Healthy runs, with cards of one maker and of two, must stay healthy. Takes about 25 s a case on two idle cores;
`--quick` runs one case of each group.

    python benchmarks/demo_diagnosis.py [--quick] [--only GROUP ...] [--keep DIR] [--again DIR] [--json] [--out FILE [--append]]

A proof can be made in parts: with `--append` the rows of FILE stay, unless a case was run again. Runs kept with
`--keep` can be judged anew after the diagnosis has changed (`--again`): a second each instead of 25.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sample_runs.moe.faults import Fault

RANKS, EXPERT_PARALLEL, SEEDS, HEALTHY_SEEDS = 4, 2, 3, 10
HEAD = "| done to the run | seed | status | first verdict | step | confidence | run | |\n|---|---|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Group:
    """Runs of one kind. every_rank: all ranks with all seeds; else the rank moves on with the seed."""

    cause: str | None
    steps: int = 120
    onset: int = 40
    every_rank: bool = False
    words: tuple[str, ...] = ()


GROUPS = {
    "slow_compute": Group("slow_device", every_rank=True),
    "slow_loader": Group("slow_dataloader", every_rank=True),
    "nan": Group("nan_origin", every_rank=True),
    "hot_expert": Group("hot_expert", steps=150),
    "gc": Group("python_gc", steps=150),
    # Two or more checkpoints behind the onset, one before; memory is read once a second.
    "checkpoint": Group("checkpoint_stall", steps=250, onset=60),
    "leak": Group("memory_leak_host", steps=300),
    "thermal": Group("thermal_throttle", steps=150),
    "healthy": Group(None, words=("--cards", "H200,H200")),
    "healthy-mixed": Group(None),
}


@dataclass(frozen=True)
class Case:
    """One run: a group's fault on a rank, or none."""

    name: str
    rank: int | None
    seed: int

    @property
    def group(self) -> Group:
        return GROUPS[self.name]

    @property
    def fault(self) -> Fault | None:
        """What is done to the run."""
        return None if self.rank is None else Fault.parse(f"{self.name}@{self.group.onset}:{self.rank}")

    @property
    def words(self) -> list[str]:
        """What `lens demo` is told."""
        fault = [] if self.rank is None else ["--fault", f"{self.name}@{self.group.onset}:{self.rank}"]
        return ["--steps", str(self.group.steps), "--seed", str(self.seed), *self.group.words, *fault]

    @property
    def title(self) -> str:
        """What was done to the run, for people."""
        if self.rank is None:
            return f"nothing{', mixed cards' if self.name == 'healthy-mixed' else ''}"
        return f"{self.name} on rank {self.rank}"

    def right(self, reply: dict[str, Any]) -> bool:
        """Whether the verdict is what was done to the run."""
        fault = self.fault
        if fault is None:
            return bool(reply["status"] == "healthy")
        first = reply["hypotheses"][0] if reply["hypotheses"] else None
        true_ranks = fault.ranks(RANKS, EXPERT_PARALLEL)
        return bool(first and first["cause"] == self.group.cause and first["ranks"] == true_ranks)


def cases(names: list[str], quick: bool) -> Iterator[Case]:
    """All runs of some groups; one of each when it must be quick."""
    for place, name in enumerate(GROUPS):
        if name not in names:
            continue
        group = GROUPS[name]
        seeds = range(HEALTHY_SEEDS if group.cause is None else SEEDS)
        ranks: list[int | None] = [None] if group.cause is None else list(range(RANKS))
        found = [Case(name, rank, seed) for rank in ranks for seed in seeds]
        if group.cause and not group.every_rank:
            found = [Case(name, (place + seed) % RANKS, seed) for seed in seeds]
        yield from found[:1] if quick else found


@contextmanager
def data_folder(case: Case, keep: Path | None) -> Iterator[Path]:
    """Where the run's data lie; they go afterwards unless they are to be kept."""
    if keep:
        yield keep / f"{case.name}-{'x' if case.rank is None else case.rank}-seed{case.seed}"
        return
    with tempfile.TemporaryDirectory(prefix="lens-proof-") as folder:
        yield Path(folder)


def run(case: Case, folder: Path) -> dict[str, Any]:
    """One demo to its end; its JSON reply."""
    command = [sys.executable, "-m", "lens", "demo", "--exit", "--json", "--no-browser", "--port", "0"]
    result = subprocess.run(
        [*command, "--data", str(folder), *case.words], capture_output=True, text=True, timeout=600
    )
    try:
        reply: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"{case}: no reply\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}") from None
    return reply


def judged(folder: Path) -> dict[str, Any]:
    """The verdict on a run that was kept, as the code that is here now gives it."""
    command = [sys.executable, "-m", "lens", "diagnose", "latest", "--data", str(folder), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise SystemExit(f"{folder} holds no run that can be judged: {result.stderr[-2000:]}")
    return {"diagnosis": json.loads(result.stdout)}


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep each run's data folder in there")
    parser.add_argument("--again", type=Path, metavar="DIR", help="judge the runs kept in there anew; run none")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--append", action="store_true", help="keep the rows that --out holds of other cases")
    arguments = parser.parse_args()
    rows, made = read_document(arguments.out) if arguments.append else ({}, [])
    right = count = 0
    command = shlex.join(["python", "benchmarks/demo_diagnosis.py", *sys.argv[1:]])
    print(HEAD)
    for case in cases(arguments.only, arguments.quick):
        with data_folder(case, arguments.again or arguments.keep) as folder:
            began = time.monotonic()
            reply = judged(folder) if arguments.again else run(case, folder)
            seconds = time.monotonic() - began
        good = "diagnosis" in reply and case.right(reply["diagnosis"])
        right, count = right + good, count + 1
        row = line(case, good, reply, seconds)
        print(row, flush=True)
        rows[key_of(row)] = row
        if arguments.out:
            now = f"- {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores: `{command}`: {right} of {count} right"
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(document(rows, [*made, now]))
    summary = {"cases": count, "right": right, "groups": arguments.only, "quick": arguments.quick}
    print(json.dumps(summary) if arguments.json else f"\n{right} of {count} right")
    return 0 if right == count else 1


def line(case: Case, right: bool, reply: dict[str, Any], seconds: float) -> str:
    """One row of the table."""
    verdict = reply.get("diagnosis") or {"status": f"no verdict: {reply.get('error')}", "hypotheses": []}
    first = verdict["hypotheses"][0] if verdict["hypotheses"] else None
    said = f"{first['cause']} {first['ranks']}" if first else "-"
    detail = f"since {first['onset_step']}, seen at {first['detected_step']}" if first else ""
    if reply.get("trainer_exit_code"):
        detail += f" (trainer ended with {reply['trainer_exit_code']})"
    confidence = f"{first['confidence']:.2f}" if first else ""
    mark = "right" if right else "WRONG"
    cells = [case.title, str(case.seed), verdict["status"], said, detail, confidence, f"{seconds:.0f} s", mark]
    return f"| {' | '.join(cells)} |"


def key_of(row: str) -> tuple[str, ...]:
    """What a row is about: what was done, and the seed."""
    return tuple(cell.strip() for cell in row.split("|")[1:3])


def read_document(path: Path | None) -> tuple[dict[tuple[str, ...], str], list[str]]:
    """Rows of a table written before, by what they are about, and the lines that say how they were made."""
    if path is None or not path.exists():
        return {}, []
    lines = path.read_text().splitlines()
    rows = [text for text in lines if text.startswith("| ") and text not in HEAD.splitlines()]
    return {key_of(row): row for row in rows}, [text for text in lines if text.startswith("- ")]


def document(rows: dict[tuple[str, ...], str], made: list[str]) -> str:
    """The table with how it was made."""
    right = sum(row.endswith("| right |") for row in rows.values())
    return (
        "# Real runs with real faults\n\n"
        "Each row is one `lens demo --exit`: real training, real faults, agents, server and diagnosis; only the cards\n"
        "are simulated. Where a case was run again, the last run stands. Made by:\n\n"
        + "\n".join(made)
        + f"\n\n**{right} of {len(rows)} right.**\n\n{HEAD}\n"
        + "\n".join(rows.values())
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
