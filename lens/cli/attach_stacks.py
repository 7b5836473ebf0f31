"""`lens attach --stacks`: where each rank stands, told rank by rank that stands alike."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from lens.attach import stacks, standing
from lens.attach.facts import Facts
from lens.attach.preflight import STATES
from lens.attach.stacks import ProcessStacks
from lens.attach.standing import Group
from lens.cli.errors import DONE, FAILED
from lens.settings import Settings

_OUTER_SHOWN = 6


def run(chosen: Sequence[Facts], settings: Settings, patience_s: float, as_json: bool) -> int:
    """Read all, print who stands where; fails if one could not be read."""
    found = [stacks.of_process(facts, settings, patience_s) for facts in chosen]
    groups = standing.groups(found)
    print(json.dumps(_as_json(found, groups)) if as_json else "\n".join(_lines(found, groups)), flush=True)
    return FAILED if any(process.error for process in found) else DONE


def _lines(found: Sequence[ProcessStacks], groups: Sequence[Group]) -> list[str]:
    rows = [(_who(group.members), _where(group)) for group in groups]
    rows += [(_who([process]), [f"not read: {process.error}"]) for process in found if process.error]
    width = max(len(who) for who, _ in rows)
    lines = []
    for who, said in rows:
        lines += [f"{who if number == 0 else '':<{width}}  {line}" for number, line in enumerate(said)]
    return lines


def _where(group: Group) -> list[str]:
    outer = [standing.spot(frame) for frame in group.place.frames[1:]]
    if len(outer) > _OUTER_SHOWN:
        outer[_OUTER_SHOWN:] = [f"{len(outer) - _OUTER_SHOWN} more"]
    doing = sorted({STATES.get(process.state or "", "unknown") for process in group.members})
    beside = Counter(
        str(standing.place_of(thread.frames))
        for process in group.members
        for thread in process.threads
        if not thread.main and any(not standing.is_library(frame) for frame in thread.frames)
    )
    others = [f"  other thread{'s' if count > 1 else ''}: {place}" for place, count in beside.items()]
    return [f"{group.place} ({' or '.join(doing)})", *(f"  ← {frame}" for frame in outer), *others]


def _who(members: Sequence[ProcessStacks]) -> str:
    ranks = [process.rank for process in members]
    if None in ranks:
        pids = ", ".join(str(process.pid) for process in members)
        return f"process{'es' if len(members) > 1 else ''} {pids}"
    return f"rank{'s' if len(ranks) > 1 else ''} {_ranges(sorted(rank for rank in ranks if rank is not None))}"


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3, 6`` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _as_json(found: Sequence[ProcessStacks], groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "groups": [
            {
                "ranks": [process.rank for process in group.members],
                "pids": [process.pid for process in group.members],
                "where": str(group.place),
                "called": group.place.called,
                "frames": [dataclasses.asdict(frame) for frame in group.place.frames],
            }
            for group in groups
        ],
        "processes": [dataclasses.asdict(process) for process in found],
    }
