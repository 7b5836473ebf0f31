"""What each rank did last, from the rings it left behind: after a crash, a hang, a kill. Needs no server.

DIR holds rings: a data folder (its newest run is taken), DATA/rings/RUN, or the live folder /dev/shm/lens-UID.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from pathlib import Path
from typing import Any

from lens.cli.errors import DONE, UNUSABLE, CommandError
from lens.ring_reader import RingError, RingReader
from lens.slots import COLLECTIVE, EVENT, PHASE, STEP, iter_records

HELP = "what each rank did last, from the rings it left behind"
KINDS = {STEP: "step", PHASE: "phase", COLLECTIVE: "collective", EVENT: "event"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--run", help="this run's rings only (default: the newest run found)")
    parser.add_argument(
        "--last", type=int, default=5, metavar="N", help="records to show a rank (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what the rings say."""
    ranks = _ranks(arguments.directory, arguments.run, arguments.last)
    if not ranks:
        raise CommandError(
            f"there is no ring of a rank under {arguments.directory}",
            "give DATA/rings/RUN of a run that has ended, or /dev/shm/lens-UID of one that lives",
            UNUSABLE,
        )
    reply = {"run": ranks[0]["run"], "ranks": ranks, "missing": missing(ranks)}
    if arguments.json:
        print(json.dumps(reply, ensure_ascii=False))
    else:
        print("\n".join(_describe(reply)))
    return DONE


def _ranks(directory: Path, run: str | None, last: int) -> list[dict[str, Any]]:
    """The ranks of one run, each from the ring it wrote last."""
    found: list[tuple[float, dict[str, Any]]] = []
    for path in sorted(directory.rglob("main*.ring")):
        try:
            reader = RingReader(path)
        except (RingError, OSError):
            continue
        about = reader.about
        if about.get("rank") is not None and (run is None or about.get("run") == run):
            found.append((path.stat().st_mtime, _last_words(reader, about, last)))
        reader.close()
    if not found:
        return []
    newest = run or max(found, key=lambda entry: entry[0])[1]["run"]
    ranks = {entry["rank"]: entry for _, entry in sorted(found, key=lambda pair: pair[0]) if entry["run"] == newest}
    return [ranks[rank] for rank in sorted(ranks)]


def _last_words(reader: RingReader, about: dict[str, Any], last: int) -> dict[str, Any]:
    records: deque[dict[str, Any]] = deque(maxlen=last)
    while (part := reader.poll()) is not None:
        records.extend(
            {**record, "type": KINDS[record["type"]]} for record in iter_records(part) if record["type"] in KINDS
        )
    collective = reader.last_collective()
    return {
        "run": about.get("run"),
        "rank": about["rank"],
        "host": about.get("host"),
        "pid": about.get("pid"),
        "ended": "cleanly" if reader.closed else "without a farewell",
        "step": reader.last_step(),
        "inside": [f"{span['kind']} {span['name']}" for span in reader.open_spans()],
        "collective": collective and {**collective, "left": collective["t0"] == 0},
        "last": list(records),
    }


def missing(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each group, the ranks whose last collective there lies behind the furthest: they never entered it."""
    furthest: dict[str, int] = {}
    for rank in ranks:
        call = rank["collective"]
        if call and call["group"]:
            furthest[call["group"]] = max(furthest.get(call["group"], -1), call["seq"])
    behind = []
    for group, seq in sorted(furthest.items()):
        late = [
            rank["rank"]
            for rank in ranks
            if rank["collective"] and rank["collective"]["group"] == group and rank["collective"]["seq"] < seq
        ]
        if late:
            behind.append({"group": group, "seq": seq, "ranks": late})
    return behind


def _describe(reply: dict[str, Any]) -> list[str]:
    lines = [f"run {reply['run']}"]
    for rank in reply["ranks"]:
        call = rank["collective"]
        who = f"rank {rank['rank']} ({rank['host']}, process {rank['pid']})"
        lines += ["", f"{who} ended {rank['ended']} at step {rank['step']}"]
        if rank["inside"]:
            lines.append(f"  it was inside: {', '.join(rank['inside'])}")
        if call:
            state = "left it" if call["left"] else "never left it"
            lines.append(
                f"  last collective entered: {call['name']} of {call['group']} number {call['seq']}; it {state}"
            )
        lines += [f"    {_line(record)}" for record in rank["last"]]
    for entry in reply["missing"]:
        who = ", ".join(map(str, entry["ranks"]))
        lines += ["", f"never entered number {entry['seq']} of {entry['group']}: rank {who}"]
    return lines


def _line(record: dict[str, Any]) -> str:
    what = record.get("name") or record.get("text") or ""
    took = f" {(record['t1'] - record['t0']) / 1e6:.3f} ms" if record.get("t1") else ""
    where = f" of {record['group']} number {record['seq']}" if record.get("group") else ""
    return f"{record['type']} {what}{where}{took} (step {record['step']})"
