"""What hook tests share: run a training script as a user would, and read what its rings hold."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.ring_reader import RingReader
from lens.slots import COLLECTIVE, EVENT, LABEL_SEPARATOR, PHASE, ROW, STEP, VECTOR, iter_records

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Recorded:
    """One process's rings."""

    about: dict[str, Any]
    closed: bool
    open: list[dict[str, Any]]
    records: list[dict[str, Any]]

    def of(self, kind: int) -> list[dict[str, Any]]:
        return [record for record in self.records if record["type"] == kind]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.of(STEP)

    @property
    def phases(self) -> list[dict[str, Any]]:
        return sorted(self.of(PHASE), key=lambda record: record["t0"])

    @property
    def collectives(self) -> list[dict[str, Any]]:
        return self.of(COLLECTIVE)

    @property
    def vectors(self) -> list[dict[str, Any]]:
        """Tokens of experts."""
        return [vector for vector in self.of(VECTOR) if vector["metric"] == "moe.expert.tokens"]

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.of(EVENT)

    def values(self, metric: str) -> list[tuple[int | None, float]]:
        """(step, value) of a metric, whatever its labels."""
        return [
            (record["step"], value)
            for record in self.of(ROW)
            for key, value in record["values"].items()
            if key.split(LABEL_SEPARATOR)[0] == metric
        ]


def read_rings(rings: Path) -> list[Recorded]:
    """Every process that recorded below `rings`, in the order of ranks."""
    found = [read_process(path.parent) for path in rings.glob("*/*/main.ring")]
    return sorted(found, key=lambda recorded: recorded.about["rank"])


def read_process(directory: Path) -> Recorded:
    readers = [RingReader(path) for path in sorted(directory.glob("*.ring"))]
    records = [record for reader in readers for part in _parts(reader) for record in iter_records(part)]
    main = next(reader for reader in readers if reader.path.stem == "main")
    return Recorded(main.about, main.closed, main.open_spans(), records)


def _parts(reader: RingReader) -> Iterator[Any]:
    while (part := reader.poll()) is not None:
        assert part.lost == 0
        yield part


QUIET_END = """
def until_its_threads_sleep():
    import pathlib, threading, time
    own, deadline, quiet = str(threading.get_native_id()), time.monotonic() + 60, 0
    while quiet < 10 and time.monotonic() < deadline:
        time.sleep(0.02)
        states = {}
        for task in pathlib.Path("/proc/self/task").iterdir():
            try:
                states[task.name] = (task / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                pass  # it has ended meanwhile
        quiet = quiet + 1 if all(state == "S" for task, state in states.items() if task != own) else 0

until_its_threads_sleep()
"""


def script_of(text: str) -> str:
    """A script as a file holds it. One with process groups ends when its threads have come to rest: one of torch's that
    still holds a group's last call when the interpreter ends aborts the process (2 of 22 runs with lens, 2 of 22 without).
    """
    text = textwrap.dedent(text)
    return f"{text}\n{QUIET_END}" if "init_process_group(" in text else text


def run_script(
    text: str, rings: Path, *, world: int = 1, timeout: float = 200, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as `world` ranks, with lens recording below `rings`."""
    script = rings.parent / "script.py"
    script.write_text(script_of(text))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    return run_python([*launcher, str(script)], rings, timeout=timeout, **environment)


def run_python(
    arguments: list[str], rings: Path, *, timeout: float = 200, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python as a user would who has set LENS_RINGS."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LENS_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **clean,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "LENS_RINGS": str(rings),
            "LENS_AGENT": "0",
            "LENS_RING_MIB": "2",
            # What is recorded must not hang on how busy this machine is; the budget has tests of its own.
            "LENS_MAX_OVERHEAD_PCT": "100",
            **environment,
        },
        cwd=rings.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
