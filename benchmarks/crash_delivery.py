"""Kill -9 what carries the records, at random moments, and count what arrives.

A writer records phases of known length into its ring; an agent ships them to a server. The server, the agent, or
both are killed again and again and started anew. At the end every record must be stored exactly once: compared by
count, by step number and by a checksum over the durations, against what the writer says it wrote.

    python benchmarks/crash_delivery.py [--kills 20] [--target server|agent|both] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RUN = "crash-delivery"
RECORDS_PER_S = 1500
WRITER = """
import json, sys, time
from pathlib import Path
from lens.recorder import Recorder
from lens.settings import Settings
rate, stop = int(sys.argv[1]), Path(sys.argv[2])
recorder = Recorder.create(Settings.load(), {"rank": 0, "world_size": 1})
name, number, checksum = recorder.intern("forward"), 0, 0
began = time.monotonic()
while not stop.exists():
    while number < (time.monotonic() - began) * rate:
        t0, length = time.monotonic_ns(), 1 + number * 7919 % 100_003
        recorder.phase(name, t0, t0 + length, number)
        checksum += length * (number + 1)
        number += 1
    time.sleep(0.005)
recorder.close()
print(json.dumps({"count": number, "checksum": checksum}), flush=True)
"""


class Stage:
    """Writer, agent and server over one temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.rings = folder / "rings"
        self.stop_file = folder / "stop"
        self.environment = {
            **os.environ,
            "LENS_DATA": str(self.data),
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
        self.server = self.start_server()
        self.agent = self.start_agent()
        self.writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(RECORDS_PER_S), str(self.stop_file)],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start_server(self) -> subprocess.Popen[Any]:
        marker = self.data / "server.json"
        marker.unlink(missing_ok=True)
        command = [sys.executable, "-m", "lens", "serve", "--data", str(self.data), "--port", str(self.port)]
        child = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)
        end = time.monotonic() + 60
        while not marker.exists():
            if child.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server did not start: {Path(self.log.name).read_text()[-2000:]}")
            time.sleep(0.02)
        # The same port after every restart: agents keep the URL they were given.
        self.port = int(json.loads(marker.read_text())["url"].rsplit(":", 1)[1])
        return child

    def start_agent(self) -> subprocess.Popen[Any]:
        command = [sys.executable, "-m", "lens", "agent", "--server", f"http://127.0.0.1:{self.port}"]
        return subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)

    def kill(self, target: str) -> None:
        for name in ("server", "agent") if target == "both" else (target,):
            child: subprocess.Popen[Any] = getattr(self, name)
            child.kill()
            child.wait()
        for name in ("server", "agent") if target == "both" else (target,):
            setattr(self, name, getattr(self, f"start_{name}")())

    def unread(self) -> bool:
        """Whether the writer's ring is still there: the agent removes it once it has read everything."""
        return any('"trainer"' in path.read_text() for path in self.rings.glob("host0/*/about.json"))

    def stop_agent(self) -> int:
        """End the agent; how many batches it leaves for the next one."""
        said = Path(self.log.name).stat().st_size
        self.agent.send_signal(signal.SIGTERM)
        self.agent.wait(60)
        with Path(self.log.name).open("rb") as log:
            log.seek(said)
            return sum(map(int, re.findall(rb"(\d+) batches stay", log.read())))

    def finish(self) -> tuple[dict[str, int], int]:
        """Let the writer end and everything arrive: what the writer says it wrote, the batches that still wait."""
        self.stop_file.touch()
        written: dict[str, int] = json.loads(self.writer.communicate(timeout=60)[0])
        end = time.monotonic() + 120
        while self.unread() and time.monotonic() < end:
            time.sleep(0.2)
        # What was killed left a backlog in the spool, which may take more than one agent's farewell: go on for as
        # long as it shrinks. A busy machine is slow, not wrong.
        waiting = self.stop_agent()
        while waiting:
            self.agent = self.start_agent()
            time.sleep(10)
            before, waiting = waiting, self.stop_agent()
            if waiting >= before:
                break
        self.server.send_signal(signal.SIGINT)
        self.server.wait(60)
        return written, waiting


def stored(data: Path) -> dict[str, int]:
    """What the store holds of the writer's records."""
    from lens.store.query import Query

    query = Query.open_folder(data)
    try:
        _, tables = query.tables(RUN)
    finally:
        query.close()
    phases = tables.select("spans", tables.spans["kind"] == tables.code("phase"))
    lengths = (phases["t1_ns"] - phases["t0_ns"]).tolist()
    steps = phases["step"].tolist()
    return {
        "count": len(steps),
        "distinct": len(set(steps)),
        "checksum": sum(length * (step + 1) for length, step in zip(lengths, steps, strict=True)),
    }


def prove(target: str, kills: int, seed: int) -> dict[str, Any]:
    """One proof; the row of the table."""
    folder = Path(tempfile.mkdtemp(prefix="lens-crash-"))
    pause = random.Random(seed)
    try:
        stage = Stage(folder)
        for _ in range(kills):
            time.sleep(pause.uniform(0.05, 1.5))
            stage.kill(target)
        time.sleep(0.5)
        written, waiting = stage.finish()
        found = stored(stage.data)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "target": target,
        "kills": kills,
        "written": written["count"],
        "stored": found["count"],
        "waiting": waiting,
        "lost": written["count"] - found["distinct"],
        "doubled": found["count"] - found["distinct"],
        "checksum_equal": written["checksum"] == found["checksum"],
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    equal = "equal" if row["checksum_equal"] else "DIFFERS"
    cells = [
        row["target"],
        row["kills"],
        row["written"],
        row["stored"],
        row["waiting"],
        row["lost"],
        row["doubled"],
        equal,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Run the proofs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--target", choices=("server", "agent", "both"), action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    rows = [
        prove(target, arguments.kills, arguments.seed) for target in arguments.target or ("server", "agent", "both")
    ]
    heads = ("killed", "kills", "written", "stored", "batches that wait", "lost or waiting", "doubled", "checksum")
    table = "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *map(line, rows)])
    print(table)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        command = f"`python benchmarks/crash_delivery.py --kills {arguments.kills}`"
        head = f"# Delivery through kill -9\n\n{command}, {time.strftime('%Y-%m-%d')}, 2 cores."
        arguments.out.write_text(f"{head}\n\n{table}\n")
    if arguments.json:
        print(json.dumps({"rows": rows}))
    return 0 if all(not row["lost"] and not row["doubled"] and row["checksum_equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
