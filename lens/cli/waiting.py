"""Who waits for whom when the records end: from the last collectives of each rank to the rank to look at first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rank = Mapping[str, Any]
SILENT = "was killed or ended without a word"
_PAIR = re.compile(r":(\d+)-(\d+)$")
_RANKS = re.compile(r"ranks/(\d+(?:,\d+)*)$")


@dataclass(frozen=True)
class Wait:
    """One collective that somebody is inside: who is, who never came, and who left it already."""

    group: str
    seq: int
    op: str
    inside: tuple[int, ...]
    absent: tuple[int, ...]
    """Members that did not enter it."""
    left: tuple[int, ...]
    """Members that have gone on: for them it ended."""
    unseen: tuple[int, ...]
    """Members that left no ring here: whether they came is not known."""


@dataclass(frozen=True)
class Suspects:
    """The ranks that the others wait for, directly or through others, and why it is they."""

    ranks: tuple[int, ...]
    because: str


def members_of(group: str, ranks: Sequence[Rank], groups: Mapping[str, Any], world_size: int | None) -> set[int]:
    """The global ranks of a group, from what the run says of it, its name, or else from who was seen in it."""
    pair, listed = _PAIR.search(group), _RANKS.match(group)
    if pair:
        return {int(pair[1]), int(pair[2])}
    if listed:
        return {int(rank) for rank in listed[1].split(",")}
    kind, _, index = group.partition("/")
    known = groups.get(kind) or ()
    if index.isdigit() and int(index) < len(known):
        return {int(rank) for rank in known[int(index)]}
    if kind == "world" and world_size:
        return set(range(world_size))
    return {rank["rank"] for rank in ranks if group in rank["entered"]}


def waits(ranks: Sequence[Rank], groups: Mapping[str, Any], world_size: int | None) -> list[Wait]:
    """Every collective that some rank is still inside, those with the most waiting first.

    Each rank has `rank`, `entered` (group → number entered last) and `collective` (the last one: name, group, seq,
    left), as `postmortem` reads them from the rings.
    """
    here = {rank["rank"] for rank in ranks}
    inside: dict[tuple[str, int], dict[int, str]] = {}
    for rank in ranks:
        call = rank["collective"]
        if call and not call["left"] and call["group"]:
            inside.setdefault((call["group"], call["seq"]), {})[rank["rank"]] = call["name"]
    found = []
    for (group, seq), calls in inside.items():
        members = members_of(group, ranks, groups, world_size)
        absent = [
            rank["rank"] for rank in ranks if rank["rank"] in members and rank["entered"].get(group, -1) < seq
        ]
        ops = " and ".join(sorted(set(calls.values())))
        left = sorted((members & here) - set(calls) - set(absent))
        found.append(Wait(group, seq, ops, tuple(calls), tuple(absent), tuple(left), tuple(sorted(members - here))))
    return sorted(found, key=lambda wait: (-len(wait.inside), wait.group, wait.seq))


def suspects(ranks: Sequence[Rank], found: Sequence[Wait]) -> Suspects | None:
    """The ranks at the end of every chain of waiting; None when nobody waited for anybody.

    Where such a chain ends inside a collective that all its members entered, one of them ended in it: then those
    that could not even report an error are meant.
    """
    # A rank in a collective that others have left waits for nobody: it was on its way out.
    held = {rank for wait in found for rank in wait.inside if wait.absent or wait.unseen or not wait.left}
    called = {rank for wait in found for rank in wait.absent}
    free = tuple(sorted(called - held))
    silent = _silent_before_any_error(ranks, {rank for wait in found if wait.absent for rank in wait.inside})
    stuck = [wait for wait in found if not wait.absent and held & set(wait.inside)]
    failed = {rank["rank"] for rank in ranks if rank["error"]}
    if free and not (silent and failed.issuperset(free)):
        waiting = sorted({rank for wait in found if wait.absent for rank in wait.inside})
        first = tuple(rank for rank in free if rank in silent) or free
        return Suspects(first, f"{names(waiting)} waited for what {_they(first)} never entered")
    if silent and (free or not stuck):
        return Suspects(silent, f"{_they(silent)} fell silent before any other rank reported an error")
    if stuck:
        return _in_a_whole_collective(ranks, max(stuck, key=lambda wait: len(called & set(wait.inside))))
    if called:
        return Suspects(tuple(sorted(called)), "each waited in a collective that the other never entered")
    return None


def _silent_before_any_error(ranks: Sequence[Rank], waiting: set[int]) -> tuple[int, ...]:
    """Ranks that ended without a word and waited for nobody, while others could later report an error.

    Launchers end all ranks once one is gone, and many of those then fail in one way or another: the first to go is
    not among them. Clocks of different hosts are not compared.
    """
    errors = [rank["error_ns"] for rank in ranks if rank["error_ns"] is not None]
    if not errors or len({rank["host"] for rank in ranks}) > 1:
        return ()
    first = min(errors)
    return tuple(
        rank["rank"] for rank in ranks
        if rank["rank"] not in waiting and rank["ended"] == SILENT and rank["seen_ns"] < first
    )  # fmt: skip


def _in_a_whole_collective(ranks: Sequence[Rank], wait: Wait) -> Suspects:
    """Of a collective that everybody who left a ring has entered: who kept it from ending."""
    name = f"{wait.op} of {wait.group} number {wait.seq}"
    if " and " in wait.op:
        return Suspects(wait.inside, f"they entered different operations under one number: {name}")
    if wait.unseen:
        return Suspects(wait.unseen, f"{name} never ended, and {_they(wait.unseen)} left no ring here")
    because = f"all members entered {name} and {names(wait.inside)} never left it"
    reported = {rank["rank"] for rank in ranks if rank["error"]}
    silent = tuple(rank for rank in wait.inside if rank not in reported)
    if silent and len(silent) < len(wait.inside):
        spoke = [rank for rank in wait.inside if rank in reported]
        return Suspects(silent, f"{because}; {names(spoke)} could still report an error")
    return Suspects(wait.inside, because)


def names(ranks: Sequence[int]) -> str:
    """ "rank 2", "ranks 0, 3"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _they(ranks: Sequence[int]) -> str:
    return "it" if len(ranks) == 1 else "they"
