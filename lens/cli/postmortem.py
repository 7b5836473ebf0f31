"""What each rank did last, from the rings it left behind: after a crash, a hang, a kill. Needs no server.

DIR holds rings: a data folder (its newest run is taken), DATA/rings/RUN, or the live folder /dev/shm/lens-UID.
Names the collective each rank entered last, who never came, the step and phase, and the rank to look at first.
Of a rank that ran out of device memory it shows what the memory held then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lens.cli.errors import DONE, UNUSABLE, CommandError
from lens.cli.waiting import SILENT, Suspects, Wait, names, suspects, waits
from lens.collectors.exits import ProcessWatch
from lens.ring_reader import RingError, RingReader
from lens.slots import COLLECTIVE, EVENT, PHASE, STEP, RingPart, iter_records

HELP = "what each rank did last, from the rings it left behind"
KINDS = {STEP: "step", PHASE: "phase", COLLECTIVE: "collective", EVENT: "event"}
SHOWN_BLOCKS = 5
"""Sizes of blocks shown of a rank that ran out of memory, those first that hold the most."""
TAIL_PARTS = 2
"""How much of a ring is decoded, in readings of up to 16384 slots: the end of a long run is what matters."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--run", help="this run's rings only (default: the newest run found)")
    parser.add_argument(
        "--last", type=int, default=5, metavar="N", help="records to show a rank (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print what the rings say."""
    about, ranks = _ranks(arguments.directory, arguments.run, arguments.last)
    if not ranks:
        raise CommandError(
            f"there is no ring of a rank under {arguments.directory}",
            "give DATA/rings/RUN of a run that has ended, or /dev/shm/lens-UID of one that lives",
            UNUSABLE,
        )
    size = about.get("world_size")
    found = waits(ranks, about.get("groups") or {}, size)
    first = suspects(ranks, found)
    if arguments.json:
        reply = {"run": about.get("run"), "world_size": size, "first": first and asdict(first)}
        print(json.dumps({**reply, "waits": [asdict(w) for w in found], "ranks": ranks}, ensure_ascii=False))
    else:
        print("\n".join(_describe(about, ranks, found, first)))
    return DONE


def _ranks(directory: Path, run: str | None, last: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is known of one run, and its ranks, each from the rings of the process that wrote last."""
    found: list[tuple[float, dict[str, Any], dict[str, Any]]] = []
    for path in sorted(directory.rglob("main.ring")):
        readers = _open(path.parent)
        about = readers[0].about if readers else {}
        if about.get("rank") is not None and about.get("role") != "agent" and run in (None, about.get("run")):
            found.append((path.stat().st_mtime, about, _last_words(readers, about, last)))
        for reader in readers:
            reader.close()
    if not found:
        return {}, []
    found.sort(key=lambda entry: entry[0])
    newest = found[-1][1]
    ranks = {words["rank"]: words for _, about, words in found if about.get("run") == newest.get("run")}
    return newest, [ranks[rank] for rank in sorted(ranks)]


def _open(directory: Path) -> list[RingReader]:
    """The rings of one process, that of its main thread first."""
    readers = []
    for path in sorted(directory.glob("*.ring"), key=lambda path: (path.stem != "main", path.name)):
        try:
            readers.append(RingReader(path))
        except (RingError, OSError):
            continue
    return readers if readers and readers[0].path.stem == "main" else []


def _last_words(readers: list[RingReader], about: dict[str, Any], last: int) -> dict[str, Any]:
    records = sorted((record for reader in readers for record in _tail(reader)), key=lambda record: record["t0"])
    spans = [span for reader in readers for span in reader.open_spans()]
    calls = [call for reader in readers if (call := reader.last_collective())]
    # One that is still open says more than one that another thread has left since.
    collective = max(calls, key=lambda call: (call["t0"] > 0, call["t0"], call["seq"]), default=None)
    entered: dict[str, int] = {}
    flights = [span for span in spans if span["kind"] == "collective"]
    for record in [*records, *calls, *flights]:
        if record.get("group") and record.get("seq") is not None:
            entered[record["group"]] = max(entered.get(record["group"], -1), record["seq"])
    errors = [record for record in records if record["type"] == "event" and record.get("kind") == "process.error"]
    phase = next((span["name"] for span in spans if span["kind"] == "phase"), None)
    return {
        "rank": about["rank"],
        "host": about.get("host"),
        "device": about.get("device"),
        "pid": about.get("pid"),
        "ended": _end(readers[0], about, bool(errors)),
        "error": errors[-1]["text"] if errors else None,
        "out_of_memory": _out_of_memory(readers[0].path.parent),
        "error_ns": errors[-1]["t0"] if errors else None,
        "seen_ns": max((max(record["t0"], record.get("t1") or 0) for record in [*records, *spans]), default=0),
        "step": readers[0].last_step(),
        "phase": phase,
        "collective": collective and {**collective, "left": collective["t0"] == 0},
        "entered": entered,
        "last": records[-last:] if last > 0 else [],
    }


def _tail(reader: RingReader) -> list[dict[str, Any]]:
    """The newest steps, phases, collectives and events of a ring."""
    parts: deque[RingPart] = deque(maxlen=TAIL_PARTS)
    while (part := reader.poll()) is not None:
        parts.append(part)
    return [
        {**record, "type": KINDS[record["type"]]}
        for part in parts
        for record in iter_records(part)
        if record["type"] in KINDS
    ]


def _out_of_memory(directory: Path) -> list[dict[str, Any]]:
    """What the device's memory held at each allocation that failed."""
    found = []
    for path in sorted(directory.glob("oom-*.json")):
        with contextlib.suppress(OSError, ValueError):  # the rank may have died while it wrote
            found.append(json.loads(path.read_text()))
    return found


def _end(reader: RingReader, about: dict[str, Any], failed: bool) -> str:
    """How the process ended, as far as the ring and this host can tell."""
    if reader.closed:
        return "ended cleanly"
    if ProcessWatch(int(about.get("pid") or 0), int(about.get("start_ticks") or 0)).alive():
        return "still runs"
    return "ended with an error" if failed else SILENT


def _describe(
    about: dict[str, Any], ranks: list[dict[str, Any]], found: list[Wait], first: Suspects | None
) -> list[str]:
    from lens.hooks.oom import sentence

    size = about.get("world_size")
    lines = [f"run {about.get('run')}: {len(ranks)} of {'n/a' if size is None else size} ranks left rings here"]
    if first:
        lines += ["", f"look first at {names(first.ranks)}: {first.because}"]
        lines += [f"  {_state(rank)}" for rank in ranks if rank["rank"] in first.ranks]
    for wait in found:
        lines.append(f"{names(wait.inside)} inside {wait.op} of {wait.group} number {wait.seq}; {_who(wait)}")
    for rank in ranks:
        lines += ["", _state(rank)]
        if rank["error"]:
            lines.append(f"  its error: {rank['error']}")
        for failed in rank["out_of_memory"]:
            lines.append(f"  {sentence(failed)}")
            lines += [f"    {_block(block)}" for block in failed["largest"][:SHOWN_BLOCKS]]
        call = rank["collective"]
        if call:
            state = "left it" if call["left"] else "never left it"
            where = f"{call['name']} of {call['group']} number {call['seq']} (step {call['step']})"
            lines.append(f"  last collective entered: {where}; it {state}")
        lines += [f"    {_line(record)}" for record in rank["last"]]
    return lines


def _who(wait: Wait) -> str:
    """Who never came."""
    parts = [f"never entered by {names(wait.absent)}"] if wait.absent else []
    parts += [f"{names(wait.unseen)} left no ring here"] if wait.unseen else []
    return "; ".join(parts) or "all its members entered it"


def _state(rank: dict[str, Any]) -> str:
    where = f"step {rank['step']}" + (f", phase {rank['phase']}" if rank["phase"] else ", between phases")
    step = where if rank["step"] is not None else "before its first step"
    device = f", {rank['device']}" if rank["device"] else ""
    return f"rank {rank['rank']} ({rank['host']}{device}, process {rank['pid']}) {rank['ended']}: {step}"


def _block(block: dict[str, Any]) -> str:
    where = f", made at {block['where']}" if block["where"] else ""
    return f"{block['count']} live blocks of {block['bytes'] / 2**20:.1f} MiB{where}"


def _line(record: dict[str, Any]) -> str:
    what = record.get("name") or record.get("text") or ""
    took = f" {(record['t1'] - record['t0']) / 1e6:.3f} ms" if record.get("t1") else ""
    where = f" of {record['group']} number {record['seq']}" if record.get("group") else ""
    step = "" if record["step"] is None else f" (step {record['step']})"
    return f"{record['type']} {what}{where}{took}{step}"
