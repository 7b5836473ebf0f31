"""Break what carries the records, at random moments, and count what arrives.

A trainer records phases of known length into its ring; an agent ships them to a server. Each of them, and two at once,
are killed with -9 again and again; disks fill up, the spool is damaged, the clock jumps, the network goes. At the end
every record must be stored exactly once and as it was recorded; where a disk has destroyed records, as many must be
told of as are gone.

    python benchmarks/crash_delivery.py [--moments 20] [--fault server] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.crash_faults import FAULTS, Fault, cannot
from benchmarks.crash_stage import PROCESSES, Stage, clear

HEADS = (
    "fault",
    "moments",
    "recorded",
    "stored",
    "lost",
    "told of",
    "doubled",
    "wrong",
    "batches that wait",
    "holds",
)


def prove(fault: Fault, moments: int, seed: int) -> dict[str, Any]:
    """One proof; the row of the table."""
    if reason := cannot(fault):
        return {"fault": fault.name, "not_run": reason}
    folder = Path(tempfile.mkdtemp(prefix="lens-crash-"))
    chance = random.Random(seed)
    stage = Stage(folder)
    began = time.monotonic()
    try:
        with fault.around(stage):
            try:
                stage.start(*PROCESSES)
                fault.before(stage)
                for _ in range(moments):
                    fault.moment(stage, chance)
                time.sleep(0.5)
                problem = fault.after(stage)
                found = stage.finish()
            finally:
                stage.end()
    finally:
        clear(folder)
    if found.lost and not fault.may_lose:
        problem = problem or f"{found.lost} records lost"
    seconds = round(time.monotonic() - began)
    holds = found.holds and not problem
    return {
        "fault": fault.name,
        "moments": moments,
        **vars(found),
        "holds": holds,
        "problem": problem,
        "seconds": seconds,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "not_run" in row:
        return f"| {row['fault']} | not run here: {row['not_run']} |" + " |" * (len(HEADS) - 2)
    told = (
        f"{row['counted']} slots, {row['damaged']} places" if row["lost"] or row["damaged"] else str(row["counted"])
    )
    verdict = "yes" if row["holds"] else f"NO {row['problem']}".strip()
    cells = [row["fault"], row["moments"], row["recorded"], row["stored"], row["lost"], told, row["doubled"],
             row["wrong"], row["waiting"], verdict]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The table with what it needs to be understood."""
    table = "\n".join([f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", *map(line, rows)])
    return f"""# Delivery through crashes, full disks, damage and cuts

`{command}`, {time.strftime("%Y-%m-%d")}, {os.cpu_count()} cores, {sum(row.get("seconds", 0) for row in rows) // 60} minutes.

A trainer records 1,500 phases a second; each stored row is compared with what the trainer noted beside its ring.
*Lost* are records that are nowhere; that may be only where the disk destroyed them in the spool, and then the store must
tell of as many slots (`lens.collector.dropped`, `drops.lost_slots` of the run; *places* are `lens.spool.corrupt`). The slots told
of include the agent's own heartbeats and readings.

{table}

- Disks are small tmpfs filled to the last byte: real `ENOSPC`. The network that goes down is the loopback of a namespace.
  Cuts within a message and slow packets are made by a proxy between agent and server, at any byte of request or answer.
- The clock that jumps is the one Python gives agent and server (`time.time_ns`); setting a machine's own needs the machine.
- In a retention, half of a second run's records are ten days old and must go, the other half must stay.
"""


def main() -> int:
    """Run the proofs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="of each fault (default: %(default)s)")
    parser.add_argument("--fault", action="append", metavar="WORD", help="only faults whose name has this word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the page there too")
    arguments = parser.parse_args()
    words = arguments.fault or [""]
    rows = []
    print("\n".join([f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]), flush=True)
    for fault in FAULTS:
        if any(word in fault.name for word in words):
            rows.append(prove(fault, arguments.moments, arguments.seed))
            print(line(rows[-1]), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page(rows, f"python benchmarks/crash_delivery.py --moments {arguments.moments}"))
    if arguments.json:
        print(json.dumps({"rows": rows}))
    return 0 if all(row.get("holds", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
