"""`lens attach --profile N`: torch's profiler over the same steps of every rank."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from lens.attach import attached, ways, windows
from lens.attach.facts import Facts
from lens.cli.errors import DONE, FAILED, CommandError
from lens.settings import Settings

_LOOK_AGAIN_S = 0.05


def run(chosen: Sequence[Facts], settings: Settings, steps: int, patience_s: float, as_json: bool) -> int:
    """Profile, print where the traces lie, and leave the processes that lens was not in before."""
    entered: list[Path] = []
    try:
        rings = {facts.pid: _ring(facts, settings, patience_s, entered) for facts in chosen}
        found = windows.profile([windows.Rank(pid, ring) for pid, ring in rings.items()], steps, patience_s)
    finally:
        attached.ask_to_leave(entered)
    end = time.monotonic() + patience_s
    while not all(map(attached.has_left, entered)) and time.monotonic() < end:
        time.sleep(_LOOK_AGAIN_S)
    if as_json:
        traces = [{**dataclasses.asdict(one), "path": one.path and str(one.path)} for one in found]
        print(json.dumps({"traces": traces}), flush=True)
    else:
        for one in found:
            who = f"process {one.pid}" if one.rank is None else f"rank {one.rank}"
            print(f"{who}  {one.path or one.text}", flush=True)
    return DONE if all(one.path for one in found) else FAILED


def _ring(facts: Facts, settings: Settings, patience_s: float, entered: list[Path]) -> Path:
    """The ring of a process, which is entered for that where lens is not in it yet."""
    rings = [ring for ring in attached.rings_of(facts.pid, settings) if ring.stem.startswith("main")]
    if rings:
        return rings[-1]
    way = ways.choose(facts, settings)
    refusal = ways.judge(facts, way, settings)
    if refusal is not None:
        raise CommandError(refusal.reason, refusal.fix)
    outcome = attached.attach(facts.pid, settings, patience_s, way)
    if outcome.ring is None:
        raise CommandError(
            f"process {facts.pid} could not be entered: {outcome.text}", f"lens attach --check {facts.pid}"
        )
    entered.append(outcome.ring)
    return outcome.ring
