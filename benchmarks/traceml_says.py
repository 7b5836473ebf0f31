"""What TraceML 0.5.0 says of the same faults, in its own words: the summary that it writes when a run ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stage import RANKS

SCRIPT = Path(__file__).with_name("traceml_moe.py")
RUN_S, HANG_S, FAREWELL_S = 240.0, 45.0, 45.0
"""How long a run may take; how long one that may hang, its start included; how long it may take to sum up after Ctrl-C."""
SECTIONS = ("step_time", "step_memory", "process", "system")
APART = "not run: it starts ranks with torchrun, not one by one in network namespaces"


def of(command: Path, words: Sequence[str], apart: bool, live: bool) -> str:
    """Its verdict and every other finding of a run with these words, or why there is none."""
    if apart:
        return APART
    with tempfile.TemporaryDirectory(prefix="traceml-") as folder:
        run = [
            str(command.absolute()), "run", str(SCRIPT), "--nproc-per-node", str(RANKS), "--logs-dir", folder,
            "--run-name", "run", "--args", *words, "--print-every", "0", "--out", f"{folder}/out",
        ]  # fmt: skip
        log = Path(folder) / "log"
        with log.open("wb") as file:
            child = subprocess.Popen(
                run, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TRACEML_MARK": folder},
            )  # fmt: skip
        began, hung = time.monotonic(), False
        while child.poll() is None and not hung:
            time.sleep(0.2)
            hung = time.monotonic() - began > (HANG_S if live else RUN_S)
        if hung:
            # As a user would, who has seen no step for long.
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(FAREWELL_S)
        _end(child, folder)
        said = ["stood still until Ctrl-C"] if hung else []
        said += [_summary(Path(folder) / "run" / "final_summary.json") or "no summary"]
        return "; ".join(said + _about_its_end(log))


def section(peers: Mapping[str, str], ours: Mapping[str, tuple[str, str]]) -> list[str]:
    """The comparison as Markdown. ours: where each fault was, and what lens says of it."""
    lines = [
        "## Beside TraceML 0.5.0", "",
        "The same training and faults under `traceml run` (summary mode, `trace_step` around each step, seed 0 of each",
        "fault, no lens), with what its final summary says: its verdict first, then every other finding with the ranks that",
        "it lists. Its rules look for time in phases of DDP trainings on GPUs, not for faults of processes, hangs or numbers:",
        "most rows are out of its scope by design, and some of its rules need GPUs that are not here.", "",
        "| done to the run | on ranks | lens names first | TraceML says |", "|---|---|---|---|",
    ]  # fmt: skip
    return [*lines, *(f"| {name} | {' | '.join(ours[name])} | {text} |" for name, text in peers.items()), ""]


def _summary(path: Path) -> str | None:
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    first = summary["primary_diagnosis"]
    said = [f"**{first['status']}**: {first['summary']}"]
    for name in SECTIONS:
        for issue in summary[name]["issues"]:
            ranks = f" (ranks {', '.join(map(str, issue['ranks']))})" if issue["ranks"] else ""
            if issue["severity"] != "info" or ranks:
                said.append(f"{issue['status']}{ranks}")
    return "; ".join(said)


def _end(child: subprocess.Popen[bytes], mark: str) -> None:
    """End what is left of it: launcher, aggregator, ranks."""
    wanted = f"TRACEML_MARK={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue
    child.wait()


def _about_its_end(log: Path) -> list[str]:
    """What the launcher says of an end that was not a success."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.startswith("[TraceML]")]
    ended = [
        line for line in lines if "raining" in line and ("exit" in line or "fail" in line) and "success" not in line
    ]
    return [f"`{line[:160]}`" for line in ended[-1:]]
