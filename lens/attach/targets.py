"""Which processes train: the ranks below a launcher, or those of this host."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lens.attach.facts import Facts, look


def below(pid: int, proc: Path = Path("/proc")) -> list[Facts]:
    """The ranks that a process has started, itself among them if it is one, by rank."""
    parents = _parents(proc)
    family = {pid}
    # A child may have a smaller number than its parent once the numbers have wrapped around.
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return ranks(family, proc)


def here(proc: Path = Path("/proc")) -> list[Facts]:
    """The ranks of this user on this host."""
    own = os.geteuid()
    return [facts for facts in ranks(_parents(proc), proc) if facts.owner == own]


def ranks(pids: Iterable[int], proc: Path = Path("/proc")) -> list[Facts]:
    """Of these processes those that train: one for each rank, the oldest, since its loaders inherit the rank.

    A process without a rank counts when it is the only one that has torch loaded.
    """
    parents = _parents(proc)
    known = [facts for facts in map(look, sorted(pids)) if facts.torch and facts.version]
    chosen: dict[int | None, Facts] = {}
    numbers = {facts.pid for facts in known}
    for facts in known:
        launched_by_rank = parents.get(facts.pid) in numbers and any(
            other.pid == parents[facts.pid] and other.rank == facts.rank for other in known
        )
        if not launched_by_rank:
            chosen.setdefault(facts.rank, facts)
    if len(chosen) > 1:
        chosen.pop(None, None)  # the launcher: it has torch loaded and no rank
    return sorted(chosen.values(), key=lambda facts: -1 if facts.rank is None else facts.rank)


def _parents(proc: Path) -> dict[int, int]:
    found = {}
    for folder in proc.glob("[0-9]*"):
        try:
            found[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    return found
