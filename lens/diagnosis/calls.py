"""The collectives that ranks called, laid side by side: who called something else, or in another order, than its like.

In a standstill the ranks that wait are mostly victims. What tells is the first call that the members of a group, or
the ranks of a stage, do not have in common.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lens.diagnosis.arrays import Ints, pack, starts_of
from lens.diagnosis.topology import Topology
from lens.slots import NULL
from lens.tables import Tables

EQUAL_SIZES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce")
"""Operations whose members all bring the same number of bytes."""
STEPS_COMPARED, FEWEST_STEPS, MOST_CALLS = 24, 3, 80_000
"""Calls are compared over this many of the last steps, fewer where they are many: the first that differs tells who left
the line."""
UNKNOWN = (NULL, -1, "")


@dataclass(frozen=True)
class Waiting:
    """A collective that a rank entered and did not leave. seq, size, step: NULL where unknown."""

    rank: int
    group: str
    seq: int
    op: str
    size: int
    t0_ns: int
    step: int = NULL


@dataclass(frozen=True)
class Calls:
    """The collectives that ranks entered in the last steps, in order of entry by rank; equal lengths."""

    rank: Ints
    step: Ints
    group: list[str]
    seq: Ints
    op: list[str]
    size: Ints
    left: Ints
    kind: list[tuple[Any, ...]]
    """What the call is, wherever it is made: kind of group, operation, layer, phase, micro-batch."""

    @classmethod
    def of(cls, tables: Tables, topology: Topology, begun: int) -> Calls:
        """Read the calls of the last steps that began after a time."""
        table = tables.collectives
        rows = np.flatnonzero((table["rank"] >= 0) & (table["t0_ns"] >= begun))
        if len(rows):
            steps, counts = np.unique(table["step"][rows], return_counts=True)
            few = int(np.searchsorted(np.cumsum(counts[::-1]), MOST_CALLS, "right"))
            kept = min(max(few, FEWEST_STEPS), STEPS_COMPARED, len(steps))
            rows = rows[table["step"][rows] >= steps[-kept]]
        key = pack(table["rank"][rows], table["t0_ns"][rows], table["group"][rows], table["seq"][rows])
        # Of a record sent open and again closed, the closed one.
        order = np.lexsort((table["t1_ns"][rows], key))
        rows = rows[order[np.r_[starts_of(key[order])[1:], len(order)] - 1]] if len(order) else rows
        text = tables.strings
        group = [text[code] if code >= 0 else "world/0" for code in table["group"][rows].tolist()]
        op = [text[code] if code >= 0 else "" for code in table["op"][rows].tolist()]
        about = zip(
            table["layer"][rows].tolist(),
            table["phase"][rows].tolist(),
            table["micro_batch"][rows].tolist(),
            strict=True,
        )
        kind = [
            (kind_of(g), o, layer, text[phase] if phase >= 0 else "", part)
            for g, o, (layer, phase, part) in zip(group, op, about, strict=True)
        ]
        return cls(
            table["rank"][rows].astype(np.int64), table["step"][rows], group, table["seq"][rows], op,
            table["bytes"][rows], table["t1_ns"][rows], kind,
        )  # fmt: skip

    def reached(self) -> dict[tuple[int, str], tuple[int, int]]:
        """The largest number that each rank entered in each group, and in which step."""
        found: dict[tuple[int, str], tuple[int, int]] = {}
        for rank, group, seq, step in zip(
            self.rank.tolist(), self.group, self.seq.tolist(), self.step.tolist(), strict=True
        ):
            if seq != NULL:
                found[rank, group] = max((seq, step), found.get((rank, group), (seq, step)))
        return found

    def finished(self) -> set[tuple[int, str, int, int]]:
        """(rank, group, number, step) of what was left."""
        columns = self.rank.tolist(), self.group, self.seq.tolist(), self.step.tolist(), self.left.tolist()
        return {call[:4] for call in zip(*columns, strict=True) if call[4] != NULL}


def called_otherwise(
    calls: Calls, waiting: Mapping[int, Waiting], topology: Topology
) -> tuple[set[int], str | None]:
    """Who gave a (group, number) another meaning than the rest of its group: operation, size, layer or step.

    The earliest such collective counts: what comes after is its consequence.
    """
    meanings, begun = _meanings(calls, waiting)
    habits = _habits(waiting, meanings)
    for key in sorted(meanings, key=lambda key: (begun.get(key, NULL), key)):
        odd = _odd_ones(meanings[key], habits)
        if odd:
            return odd, _told_apart(key, meanings[key], odd)
    return set(), None


Meanings = dict[tuple[str, int], dict[int, tuple[Any, ...]]]
STEP = 5
"""Place of the step in a meaning."""


def _meanings(calls: Calls, waiting: Mapping[int, Waiting]) -> tuple[Meanings, dict[tuple[str, int], int]]:
    """What each rank meant by (group, number): operation, size, layer, phase, micro-batch, step; and its first step."""
    meanings: Meanings = {}
    begun: dict[tuple[str, int], int] = {}
    again = _numbered_anew(calls)
    for place, (rank, group, seq) in enumerate(
        zip(calls.rank.tolist(), calls.group, calls.seq.tolist(), strict=True)
    ):
        if seq == NULL or calls.op[place] in ("send", "recv"):
            continue
        size = int(calls.size[place]) if calls.op[place] in EQUAL_SIZES else NULL
        step = int(calls.step[place])
        told = NULL if group in again else step
        meanings.setdefault((group, seq), {})[rank] = (calls.op[place], size, *calls.kind[place][2:], told)
        begun[group, seq] = min(step, begun.get((group, seq), step))
    for rank, item in waiting.items():
        # Known from a heartbeat alone: only its operation is.
        meanings.setdefault((item.group, item.seq), {}).setdefault(rank, (item.op, item.size))
    return meanings, begun


def _numbered_anew(calls: Calls) -> set[str]:
    """Groups in which a rank used a number in two steps: there a number alone does not name a collective."""
    seen: dict[tuple[int, str, int], int] = {}
    columns = calls.rank.tolist(), calls.group, calls.seq.tolist(), calls.step.tolist()
    return {
        group for rank, group, seq, step in zip(*columns, strict=True)
        if seen.setdefault((rank, group, seq), step) != step
    }  # fmt: skip


def _habits(waiting: Mapping[int, Waiting], meanings: Meanings) -> set[int]:
    """Places of a meaning in which collectives that everybody left differ: this program is like that."""
    inside = {(item.group, item.seq) for item in waiting.values()}
    found = set()
    for key, meant in meanings.items():
        if key not in inside:
            for place, values in enumerate(zip(*meant.values(), strict=False)):
                if place != STEP and len({value for value in values if value not in UNKNOWN}) > 1:
                    found.add(place)
    return found


def _odd_ones(meant: Mapping[int, tuple[Any, ...]], habits: set[int]) -> set[int]:
    """Ranks whose call differs from most others' in anything that both tell; all of them when it is half and half."""
    for place in range(max(map(len, meant.values()), default=0)):
        votes: dict[Any, set[int]] = {}
        for rank, meaning in meant.items():
            if len(meaning) > place and meaning[place] not in UNKNOWN:
                votes.setdefault(meaning[place], set()).add(rank)
        if len(votes) > 1 and place not in habits:
            return _minority(votes.values())
    return set()


def _minority(parts: Iterable[set[int]]) -> set[int]:
    sets = list(parts)
    most = max(len(ranks) for ranks in sets)
    fewer = [ranks for ranks in sets if len(ranks) < most]
    return set().union(*(fewer or sets))


def _told_apart(key: tuple[str, int], meant: Mapping[int, tuple[Any, ...]], odd: set[int]) -> str:
    """In words: what the odd ones called, and what the others did."""
    own, place = meant[min(odd)], f"as number {key[1]} of {key[0]}"
    others = [meaning for rank, meaning in meant.items() if rank not in odd] or [
        meaning for meaning in meant.values() if meaning != own
    ]
    usual = Counter(meaning[:2] for meaning in others).most_common(1)[0][0]
    if usual[0] != own[0]:
        return f"called {own[0]} {place}, the others {usual[0]}"
    if usual[1] != own[1] and NULL not in (usual[1], own[1]):
        return f"called {own[0]} with {own[1]} bytes {place}, the others with {usual[1]}"
    return f"called {own[0]} {place} at another place of the program than the others"


def ahead_or_behind(
    calls: Calls, waiting: Mapping[int, Waiting], topology: Topology
) -> tuple[set[int], str | None]:
    """Ranks that wait in another number of a group than most of those who wait in it."""
    numbers: dict[str, dict[int, set[int]]] = {}
    for item in waiting.values():
        if item.seq != NULL and item.op not in ("send", "recv"):
            numbers.setdefault(item.group, {}).setdefault(item.seq, set()).add(item.rank)
    for _, votes in sorted(numbers.items()):
        if len(votes) > 1:
            odd = _minority(votes.values())
            own = max(seq for seq, ranks in votes.items() if ranks & odd)
            rest = max((seq for seq, ranks in votes.items() if not ranks & odd), default=own)
            return odd, "ran ahead of the others" if own > rest else "is behind the others" if own < rest else None
    return set(), None


def out_of_order(calls: Calls, waiting: Mapping[int, Waiting], topology: Topology) -> tuple[set[int], str | None]:
    """Ranks whose calls of the last steps are not those, in that order, of the other ranks of their stage.

    Only where the step before was equal on all: some programs let a rank call more than the others, in every step.
    """
    sequences: dict[int, dict[int, list[tuple[Any, ...]]]] = {}
    newest: dict[int, int] = {}
    for rank, step, kind in zip(calls.rank.tolist(), calls.step.tolist(), calls.kind, strict=True):
        sequences.setdefault(step, {}).setdefault(rank, []).append(kind)
        newest[rank] = max(step, newest.get(rank, step))
    steps = sorted(step for step in sequences if step != NULL)[-3:]
    for before, step in itertools.pairwise(steps):
        for ranks in _by_stage(topology, set(calls.rank.tolist())):
            if _differing(ranks, sequences[before], set()):
                continue
            odd = _differing(ranks, sequences[step], {rank for rank in ranks if newest.get(rank, step) <= step})
            if odd:
                return odd, f"left the order of calls in step {step}"
    return set(), None


def _by_stage(topology: Topology, reporting: set[int]) -> list[list[int]]:
    stages: dict[int | None, list[int]] = {}
    for rank, stage in zip(topology.ranks.tolist(), topology.stage, strict=True):
        if rank in reporting:
            stages.setdefault(stage, []).append(rank)
    return [ranks for ranks in stages.values() if len(ranks) > 1]


def _differing(ranks: Sequence[int], calls: Mapping[int, list[tuple[Any, ...]]], unfinished: set[int]) -> set[int]:
    """The ranks whose list of calls parts first from that of most; the lists of some are not over yet."""
    lists = {rank: calls.get(rank, []) for rank in ranks}
    for place in range(max(len(items) for items in lists.values())):
        votes: dict[Any, set[int]] = {}
        for rank, items in lists.items():
            if len(items) > place:
                votes.setdefault(items[place], set()).add(rank)
            elif rank not in unfinished:
                votes.setdefault(None, set()).add(rank)
        if len(votes) > 1:
            return _minority(votes.values())
    return set()


def kind_of(group: str) -> str:
    """Kind of a group."""
    return group.split("/")[0]
