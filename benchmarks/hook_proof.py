"""What the hook costs, as a proof: both recorders, the compiled one several times, and the peers in the same step.

python benchmarks/hook_proof.py [--quick] [--repeat 3] [--peers PYTHON] [--traceml COMMAND] [--out FILE]
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.hook_overhead import section

LIMITS = {("native", 11): 20, ("native", 60): 40, ("python", 11): 60}
"""What a step may cost: recorder and collectives -> µs."""
HOW = """
A real step of about 20 ms on one thread, which evicts the caches between one collective and the next; the backend of
`torch.distributed` is torch's fake, whose collectives do nothing, so that their own time is no noise. Clocks stand at the
edges where lens stands: between the call of a function and the beginning of its original, and back. Each edge is
compared with itself: the mean of the middle half of its times with lens, less that without (which holds the clock pair
and whatever of torch lies between); blocks of ten steps with and without take turns, and each block with lens is compared
with the two beside it. The sum of these differences is the host time a step: the median over the blocks, in brackets the
interval that holds it with 95 % confidence. Under the compiled recorder a collective's edge begins where torch enters C++
and ends when its call has returned, since lens is inside. *Noise* is the same for steps without lens, over those without
before and after them. The first eight steps of each block with lens are left out: in them, once in a training, the
model's operations are counted and the backend is asked for the number of every collective. Nor does a middle show the
one step a second that counts tokens and reads memory. Nine of ten steps: sums of a whole step's edges over the
usual ones, with lens and without. The hook's own word is what it measures itself and reports as `lens.overhead.*`; it does
not see what its being called costs, nor what it evicts. Peers log the same values, a call a step, into storage of their
own on this machine; TraceML is measured at the same edges, and around its `trace_step`.
"""


def run(*more: str) -> dict[str, Any]:
    """One run of the benchmark."""
    command = [sys.executable, str(Path(__file__).with_name("hook_overhead.py")), "--json", *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def against_limits(runs: list[dict[str, Any]]) -> list[str]:
    """Every run against what it may cost, as Markdown."""
    lines = [
        "| recorder | collectives | µs a step, run by run (95 %) | own word | noise | limit |",
        "|---|---|---|---|---|---|",
    ]
    for tier in ("native", "python"):
        for count in (11, 60):
            mine = [found for found in runs if found["tier"] == tier]

            def shown(key: str, mine: list[dict[str, Any]] = mine, count: int = count) -> str:
                return " · ".join(f"{found[f'{key}_{count}']:.0f}" for found in mine)

            def within(found: dict[str, Any], count: int = count) -> str:
                low, high = (f"{found[f'host_us_{end}_{count}']:.0f}" for end in ("low", "high"))
                return f"{found[f'host_us_per_step_{count}']:.0f} ({low} to {high})"

            limit = LIMITS.get((tier, count))
            host = " · ".join(map(within, mine))
            cells = [tier, str(count), host, shown("reported_us_per_step"), shown("noise_us")]
            lines.append(f"| {' | '.join(cells)} | {limit or ''} |")
    return lines


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each recorder (default %(default)s)")
    parser.add_argument("--peers", help="Python of an environment with trackio, wandb and tensorboard")
    parser.add_argument("--traceml", help="its command, in an environment of its own")
    parser.add_argument("--out", type=Path, help="write the proof here")
    options = parser.parse_args()
    quick = ["--quick"] if options.quick else []
    beside = [
        word for name in ("peers", "traceml") if (value := getattr(options, name)) for word in (f"--{name}", value)
    ]
    first, python = run(*quick, *beside), run(*quick, "--python")
    runs = [first, python]
    for _ in range(options.repeat - 1):
        runs += [run("--quick"), run("--quick", "--python")]
    versions = ", ".join(f"{name} {version}" for name, version in first["peer_versions"].items()) or "none"
    lines = [
        "# What the hook costs a step", "",
        f"`make prove-hook`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[2]:.1f} over the last 15 minutes. Peers: {versions}.", "",
        *against_limits(runs), "", "## How it is measured", *HOW.splitlines(), "", *section(first), *section(python),
    ]  # fmt: skip
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
