"""Real runs with real faults, start to verdict: is the right cause named first, on the right rank?

Each case is one `lens demo --exit` in a data folder of its own: trainer, agents, server and diagnosis are the real
ones. Healthy runs must stay healthy. Takes about 20 s a case; `--quick` runs one seed on one rank of each fault.

    python benchmarks/demo_diagnosis.py [--quick] [--json] [--out docs/proofs/demo_diagnosis.md]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAUSES = {"slow_compute": "slow_device", "slow_loader": "slow_dataloader", "nan": "nan_origin"}
STEPS, ONSET, RANKS, SEEDS, HEALTHY = 120, 40, 4, 3, 10


@dataclass(frozen=True)
class Case:
    """One run: a fault on a rank, or none."""

    fault: str | None
    rank: int | None
    seed: int

    @property
    def words(self) -> list[str]:
        return ["--fault", f"{self.fault}@{ONSET}:{self.rank}"] if self.fault else []

    def right(self, reply: dict[str, Any]) -> bool:
        """Whether the verdict is what was done to the run."""
        if self.fault is None:
            return bool(reply["status"] == "healthy")
        first = reply["hypotheses"][0] if reply["hypotheses"] else None
        return bool(first and first["cause"] == CAUSES[self.fault] and first["ranks"] == [self.rank])


def cases(quick: bool) -> list[Case]:
    """All runs of the proof."""
    if quick:
        return [Case(fault, 1 + index, 0) for index, fault in enumerate(CAUSES)] + [Case(None, None, 0)]
    faulty = [Case(f, r, s) for f in CAUSES for r in range(RANKS) for s in range(SEEDS)]
    return faulty + [Case(None, None, seed) for seed in range(HEALTHY)]


def run(case: Case, folder: Path) -> dict[str, Any]:
    """One demo to its end; its JSON reply."""
    command = [
        sys.executable, "-m", "lens", "demo", "--exit", "--json", "--no-browser", "--port", "0",
        "--steps", str(STEPS), "--seed", str(case.seed), "--data", str(folder), *case.words,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    try:
        reply: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"{case}: no reply\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}") from None
    return reply


def main() -> int:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the table there too")
    parser.add_argument("--only", help="one fault's name, or healthy")
    arguments = parser.parse_args()
    rows: list[tuple[Case, bool, dict[str, Any], float]] = []
    for case in cases(arguments.quick):
        if arguments.only not in (None, case.fault or "healthy"):
            continue
        with tempfile.TemporaryDirectory(prefix="lens-proof-") as folder:
            began = time.monotonic()
            reply = run(case, Path(folder))
            if "diagnosis" not in reply:
                raise SystemExit(f"{case}: {reply}")
            rows.append((case, case.right(reply["diagnosis"]), reply["diagnosis"], time.monotonic() - began))
        print(line(*rows[-1]), flush=True)
    right = sum(row[1] for row in rows)
    summary = {"cases": len(rows), "right": right, "steps": STEPS, "onset": ONSET, "quick": arguments.quick}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(document(rows, right))
    print(json.dumps(summary) if arguments.json else f"\n{right} of {len(rows)} right")
    return 0 if right == len(rows) else 1


def line(case: Case, right: bool, reply: dict[str, Any], seconds: float) -> str:
    """One row of the table."""
    done = f"{case.fault} on rank {case.rank}" if case.fault else "nothing"
    first = reply["hypotheses"][0] if reply["hypotheses"] else None
    said = f"{first['cause']} {first['ranks']}" if first else "-"
    detail = f"since {first['onset_step']}, seen at {first['detected_step']}" if first else ""
    confidence = f"{first['confidence']:.2f}" if first else ""
    mark = "right" if right else "WRONG"
    cells = [done, str(case.seed), reply["status"], said, detail, confidence, f"{seconds:.0f} s", mark]
    return f"| {' | '.join(cells)} |"


def document(rows: list[tuple[Case, bool, dict[str, Any], float]], right: int) -> str:
    """The table with how it was made."""
    head = (
        "# Real runs with real faults\n\n"
        f"`python benchmarks/demo_diagnosis.py`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, 2 cores.\n"
        f"Each row is one `lens demo --exit --steps {STEPS}`; faults begin at step {ONSET}.\n\n"
        f"**{right} of {len(rows)} right.**\n\n"
        "| done to the run | seed | status | first verdict | step | confidence | run | |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(line(*row) for row in rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
