"""What a diagnosis costs from 8 to 16,384 ranks and up to 10,000 steps: seconds and memory, with a slow card that must be
named.

Up to 1,024 ranks the records are spans of every rank; beyond, vectors over ranks, as large runs send them. Each size is
a process of its own: its peak memory is the diagnosis' own, and what the records take stands beside it.

    python benchmarks/diagnosis_scale.py [--ranks N ...] [--steps N] [--lengths N ...] [--out FILE]

Beside FILE the growth is drawn, FILE with the ending .svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from growth_plot import growth

SIZES = (8, 64, 256, 1024, 2048, 4096, 8192, 16384)
LENGTHS, RANKS_OF_LENGTHS = (100, 1_000, 10_000), 8
TIMES = 3
TARGET_S = 2.0
HEAD = (
    "| ranks | steps | records | records hold | processor time, best of 3 | wall time of it | peak memory of it | named |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Measure all sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=SIZES)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=LENGTHS, help=f"steps of runs of {RANKS_OF_LENGTHS} ranks"
    )
    parser.add_argument(
        "--times", type=int, default=TIMES, help="the best of so many counts (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="write the page here too")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one, chosen.steps, chosen.times)))
        return
    sizes = [(ranks, chosen.steps) for ranks in chosen.ranks]
    measured = _measured(sizes, chosen.times)
    longer = _measured([(RANKS_OF_LENGTHS, steps) for steps in chosen.lengths], chosen.times)
    if chosen.out:
        picture = chosen.out.with_suffix(".svg")
        chosen.out.write_text(_page(measured, longer, chosen.steps, picture.name))
        seconds = {"processor time, best of 3": [found["best"][0] for found in measured]}
        picture.write_text(
            growth(f"A diagnosis of {chosen.steps} steps, by ranks", chosen.ranks, seconds, "s", TARGET_S)
        )


def _measured(sizes: list[tuple[int, int]], times: int) -> list[dict[str, Any]]:
    """What is measured of runs of so many ranks and steps, each in a process of its own; printed as it comes."""
    found = []
    print(HEAD)
    for ranks, steps in sizes:
        command = [sys.executable, __file__, "--one", str(ranks), "--steps", str(steps), "--times", str(times)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
        print(_row(found[-1]), flush=True)
    return found


def measure(ranks: int, steps: int, times: int) -> dict[str, Any]:
    """Simulate a run of so many ranks and judge it, in this process."""
    from lens.diagnosis import diagnose
    from lens.tables import SCHEMA
    from sample_runs.cluster import Cluster, Fault, Layout, simulate

    fault = Fault("slow_device", steps // 2, ranks // 3, 1.5)
    cluster = Cluster(Layout(ranks, ep=8), steps, "checkpoint", (fault,), seed=1)
    tables, run = simulate(cluster).tables, cluster.run()
    held = (
        sum(column.nbytes for name in SCHEMA for column in tables.table(name).values())
        + tables.vector_values.nbytes
    )
    took, before = [], _reset_peak()
    for _ in range(times):
        since = time.process_time(), time.perf_counter()
        reply = diagnose(run, tables)
        took.append((time.process_time() - since[0], time.perf_counter() - since[1]))
    first = reply["hypotheses"][0] if reply["hypotheses"] else {"cause": "nothing", "ranks": []}
    return {
        "ranks": ranks, "steps": steps, "records": tables.total, "held": held, "best": min(took), "more": _memory("VmHWM") - before,
        "named": f"{first['cause']} {first['ranks']}", "right": first["ranks"] == [fault.rank],
    }  # fmt: skip


def _reset_peak() -> int:
    """Let Linux forget the most memory that this process had; what it has now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) * 1024


def _row(found: dict[str, Any]) -> str:
    mib = 1024.0**2
    return (
        f"| {found['ranks']:,} | {found['steps']:,} | {found['records']:,} | {found['held'] / mib:,.0f} MiB | {found['best'][0]:.2f} s | "
        f"{found['best'][1]:.2f} s | {found['more'] / mib:,.0f} MiB | {found['named']}{'' if found['right'] else ' (wrong)'} |"
    )


def _page(measured: list[dict[str, Any]], longer: list[dict[str, Any]], steps: int, picture: str) -> str:
    command = "python benchmarks/diagnosis_scale.py --out docs/proofs/diagnosis_scale.md"
    largest = measured[-1]
    reached = largest["best"][0] <= TARGET_S
    return "\n".join([
        "# What a diagnosis costs, by ranks and by steps",
        "",
        "Simulated runs (`sample_runs.cluster`) in which one card becomes 1.5 times slower in the middle. Up to 1,024 "
        "ranks the records are spans of every rank, beyond that vectors over ranks, as large runs send them. Made by "
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores; the diagnosis uses one; where "
        "wall time is longer than processor time, others used the machine too. "
        f"Peak memory is what the process needed beyond its records. The target is {TARGET_S:g} s at 16,384 ranks.",
        "",
        f"**At {largest['ranks']:,} ranks it takes {largest['best'][0]:.2f} s: the target is {'' if reached else 'not '}reached.**",
        "",
        f"## From 8 to 16,384 ranks, {steps} steps",
        "",
        f"![processor time by ranks, both logarithmic]({picture})",
        "",
        "The step down from 1,024 to 2,048 ranks is where vectors take the place of spans.",
        "",
        HEAD,
        *map(_row, measured),
        "",
        f"## Longer runs, {RANKS_OF_LENGTHS} ranks",
        "",
        "Each finding is also dated: to the first step whose reply would have held it, of all steps of the run.",
        "",
        HEAD,
        *map(_row, longer),
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
