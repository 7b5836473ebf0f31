"""kill -9 of one rank of a real run, at a random moment: does `lens postmortem` name that rank first?

Each row is one `python -m sample_runs.moe --world 4` without server and agent: once it trains, one rank is killed, the
launcher ends the others, and only the rings are read. Takes about half a minute a kill.

    python benchmarks/killed_ranks.py [--kills 12] [--json] [--out docs/proofs/postmortem.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RANKS, WARM_STEPS, WINDOW_S, PATIENCE_S = 4, 30, 2.0, 300.0


def killed(victim: int, folder: Path) -> dict[str, Any]:
    """What `lens postmortem` says after one rank of a run of its own was killed."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LENS_AGENT": "0", "LENS_RUN": "killed",
        "LENS_RINGS": str(folder / "rings"),
    }  # fmt: skip
    command = [sys.executable, "-m", "sample_runs.moe", "--world", str(RANKS), "--steps", "1000000"]
    log = folder / "log"
    with log.open("w") as output:
        training = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
    try:
        end = time.monotonic() + PATIENCE_S
        while f"step {WARM_STEPS:>5}" not in log.read_text():
            if time.monotonic() > end or training.poll() is not None:
                sys.exit(f"the training did not begin: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        time.sleep(random.random() * WINDOW_S)
        abouts = [json.loads(path.read_text()) for path in folder.glob("rings/*/*/about.json")]
        os.kill(next(about["pid"] for about in abouts if about["rank"] == victim), signal.SIGKILL)
        training.wait(PATIENCE_S)
    finally:
        training.kill()
    words = [sys.executable, "-m", "lens", "postmortem", str(folder / "rings"), "--json"]
    reply: dict[str, Any] = json.loads(
        subprocess.run(words, env=environment, capture_output=True, check=True).stdout
    )
    return reply


def row(victim: int, reply: dict[str, Any]) -> tuple[bool, str]:
    """Whether the rank was named, and the line of the table."""
    first = reply["first"] or {"ranks": [], "because": "nobody was named"}
    where = next(rank for rank in reply["ranks"] if rank["rank"] == victim)
    right = first["ranks"] == [victim]
    call = where["collective"]
    inside = (
        f"{call['name']} of {call['group']}" if call and not call["left"] else where["phase"] or "between phases"
    )
    cells = [str(victim), inside, str(first["ranks"]), first["because"], "right" if right else "WRONG"]
    return right, f"| {' | '.join(cells)} |"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--out", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    rows = []
    for number in range(arguments.kills):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(number % RANKS, killed(number % RANKS, Path(folder))))
        print(rows[-1][1], flush=True)
    right = sum(entry[0] for entry in rows)
    if arguments.out:
        head = (
            "# Whom to look at after a kill\n\n"
            f"`python benchmarks/killed_ranks.py --kills {arguments.kills}`, {time.strftime('%Y-%m-%d')}, "
            f"{platform.machine()}, {os.cpu_count()} cores. Each row is one run of four ranks of which one was killed.\n\n"
            f"**{right} of {len(rows)} named.**\n\n"
            "| killed | while it was in | named first | because | |\n|---|---|---|---|---|\n"
        )
        arguments.out.write_text(head + "".join(f"{line}\n" for _, line in rows))
    print(json.dumps({"kills": len(rows), "named": right}) if arguments.json else f"\n{right} of {len(rows)} named")
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
