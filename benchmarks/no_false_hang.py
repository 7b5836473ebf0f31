"""A long run that stands still again and again for good reasons: is it ever called hung?

Four real ranks on gloo, with checkpoints to a slow disk on all ranks (longer than the 5 s after which a standstill is
looked at), long evaluations, and attention compiled from nothing by torch.compile, caches off, without any phase that
announces it. The verdict is asked for again two seconds after each answer.

    python benchmarks/no_false_hang.py [--minutes N] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stage import PATIENCE_S, Run, Stage

ASK_S = 2.0
EVERY = {"checkpoint": 230, "eval": 170, "compile": 400}
"""Steps between two of a kind."""
WORDS = (
    "--steps", "1000000", *(word for kind, every in EVERY.items() for word in (f"--{kind}-every", str(every))),
    "--eval-batches", "300", "--fault", "checkpoint@60x150",
)  # fmt: skip
STALLS = """
SELECT max(gap) FROM (
    SELECT (t1_ns - lagInFrame(t1_ns, 1, t1_ns) OVER (ORDER BY t1_ns ROWS BETWEEN 1 PRECEDING AND CURRENT ROW)) / 1e9 AS gap
    FROM collectives WHERE run = '{run}' AND rank = 0
)"""
LONGEST = "SELECT name, max(duration_s) FROM spans WHERE run = '{run}' AND kind = 'phase' GROUP BY name"


def watch(run: Run, minutes: float) -> dict[str, Any]:
    """Ask until the time is over; what was said."""
    end = time.monotonic() + 60 * minutes
    asked, statuses, named, alarms = 0, {}, Counter[str](), []
    while time.monotonic() < end and not run.wait(ASK_S):
        reply = run.verdict()
        if not reply:
            continue
        asked += 1
        statuses[reply["status"]] = statuses.get(reply["status"], 0) + 1
        named.update({item["cause"] for item in reply["hypotheses"] if item["severity"] == "warning"})
        alarms += [f"step {reply['upto_step']}: {reply['status']}, {item['cause']} {item['ranks']}"
                   for item in reply["hypotheses"] if item["severity"] == "error"]  # fmt: skip
    if any(one.poll() is not None for one in run.ranks):
        raise SystemExit(f"the training ended by itself: {run.log.read_text()[-2000:]}")
    return {"asked": asked, "statuses": statuses, "named": dict(named), "alarms": alarms}


def main() -> int:
    """Run, watch, and say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    with Stage.opened() as stage, stage.run(WORDS, ["H200", "H200"]) as run:
        began = time.monotonic()
        while not run.verdict():
            if time.monotonic() - began > PATIENCE_S or run.wait(0.2):
                raise SystemExit(f"no run: {run.log.read_text()[-2000:]}")
        found = watch(run, chosen.minutes)
        phases = dict(_rows(run, LONGEST))
        steps = (stage.reader.run(run.name)["last_step"] or 0) + 1
        found |= {
            "minutes": chosen.minutes,
            "steps": steps,
            "count": {kind: steps // every for kind, every in EVERY.items()},
            "longest_s": {name: phases[name] for name in ("checkpoint", "eval", "forward") if name in phases},
            "longest_standstill_s": _rows(run, STALLS)[0][0],
        }
    text = document(found)
    if chosen.out:
        chosen.out.write_text(text)
    print(json.dumps(found) if chosen.json else text)
    return 1 if found["alarms"] else 0


def _rows(run: Run, sql: str) -> list[list[Any]]:
    rows: list[list[Any]] = run.stage.reader.sql_reply(sql.format(run=run.name), run.name)["rows"]
    return rows


def document(found: dict[str, Any]) -> str:
    """What was seen, for people."""
    command = f"python benchmarks/no_false_hang.py --minutes {found['minutes']:g}"
    longest = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found["longest_s"].items())
    said, named = (
        ", ".join(f"{name} {count}" for name, count in found[key].items()) for key in ("statuses", "named")
    )
    lines = [
        "# A long run that stands still for good reasons", "",
        "Four real ranks with slow checkpoints, long evaluations and real compilations that nothing announces; the verdict is",
        "asked for again two seconds after each answer. Nothing of it may be called hung.", "",
        f"Made on {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores: `{command}`", "",
        "| | |", "|---|---|",
        f"| minutes, steps | {found['minutes']:g}, {found['steps']} |",
        f"| checkpoints, evaluations, compilations | {', '.join(map(str, found['count'].values()))} |",
        f"| longest of a rank | {longest} |",
        f"| longest time in which rank 0 ended no collective | {found['longest_standstill_s']:.1f} s |",
        f"| asked, answers by status | {found['asked']}: {said} |",
        f"| findings by cause (its saves are slow) | {named or '–'} |",
        f"| false alarms (hung, failed) | **{len(found['alarms'])}** {'; '.join(found['alarms'][:5])} |", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
