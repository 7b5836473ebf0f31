"""Who calls a collective, and is it seen? Caller × collective, for both tiers and for 2 and 4 ranks.

One real program on gloo in which each caller has a step of its own and says what it must have sent; the program and
the way it is read are those of tests/hooks/test_coverage.py. Counted over all ranks: calls made, calls recorded with
exactly their bytes, with their entry, and with a completion apart from the return to their caller.

    python benchmarks/coverage.py [--json] [--out docs/proofs/coverage.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from lens.hooks import native
from tests.hooks.test_coverage import SEEN, UNTOLD, Covered, Line, cover, lines

TIERS = ("native", "python")
WORLDS = (2, 4)


def verdict(line: Line, tier: str) -> str:
    """What became of the calls of one line; ``WRONG`` where it is not what the documentation promises."""
    promised = line.made if line.caller in SEEN[tier] else 0
    told = tier != "native" or line.op in UNTOLD or line.completed == promised
    if not line.seen == line.entered == promised or not told:
        return "WRONG"
    return "seen" if promised else "not seen, as documented"


def document(runs: list[Covered]) -> str:
    """The tables with how they were made."""
    found = [(covered, line) for covered in runs for line in lines(covered)]
    wrong = sum(verdict(line, covered.tier) == "WRONG" for covered, line in found)
    parts = [
        "# Who sees collectives\n",
        f"`make prove-coverage`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores; python "
        f"{platform.python_version()}, torch {torch.__version__}, gloo. Counted over all ranks. Seen: recorded with "
        "exactly the bytes that the formula gives, once. Completion: told apart from the return to the caller, which "
        "gloo does not do for `send`, `recv` and `reduce_scatter`. With NCCL and RCCL it has not been run yet.\n",
        f"**{len(found) - wrong} of {len(found)} lines are as documented.**\n",
    ]
    for covered in runs:
        parts.append(f"## {covered.tier}, {covered.world} ranks\n")
        parts.append("| caller | collective | made | seen | entry | completion | |\n|---|---|---|---|---|---|---|")
        parts += [
            f"| {line.caller} | {line.op} | {line.made} | {line.seen} | {line.entered} | {line.completed} | "
            f"{verdict(line, covered.tier)} |"
            for line in lines(covered)
        ]
        parts.append("")
    return "\n".join(parts)


def main() -> int:
    """Run the program for each tier and world; 1 when a line is not as documented."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the tables here too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    arguments = parser.parse_args()
    tiers = TIERS if native.built("observer") else TIERS[1:]
    if tiers != TIERS:
        print("the native tier is not compiled: lens doctor --build", file=sys.stderr)
    runs = []
    for tier in tiers:
        for world in WORLDS:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(cover(tier, world, Path(folder) / "rings"))
    text = document(runs)
    if arguments.out:
        arguments.out.write_text(text)
    if arguments.json:
        rows = [
            {"tier": covered.tier, "world": covered.world, **line._asdict(), "verdict": verdict(line, covered.tier)}
            for covered in runs
            for line in lines(covered)
        ]
        print(json.dumps({"lines": rows}))
    else:
        print(text)
    return int("WRONG" in text or tiers != TIERS)


if __name__ == "__main__":
    sys.exit(main())
