"""Who sends to whom, who waits for whom, how fast each group moves its bytes, and how much of it training feels.

A collective is one (group, seq) on all members of its group. Its last entry is when the last member came: until
then the others wait, after it bytes move. One that lacks a member tells neither and counts in `incomplete`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from lens.slots import NULL
from lens.store.engine import Store
from lens.store.errors import BadQueryError
from lens.store.held import held_from, held_seconds
from lens.store.readback import read_tables
from lens.store.runs import Run
from lens.tables import Column, Table, Tables

MOST_ROWS = 400_000
"""Collectives read for one answer; of a longer range the newest steps are taken, and the answer says which."""
_POINT_TO_POINT = re.compile(r":(\d+)-(\d+)$")
_TO_EACH_PEER = {"all_reduce": 2.0, "reduce_scatter": 1.0, "all_to_all": 1.0, "all_gather": 0.0}
"""Part of a rank's input buffer that goes to each peer, times the ranks; an all-gather sends all of it."""
_NS = 1e9


def bus_bytes(op: str, size: float, ranks: int) -> float | None:
    """Bytes that the busiest link moves when each of `ranks` gives `size` bytes; None where that says nothing.

    The size of an all-gather is that of its result, as bandwidth tests count it.
    """
    if ranks < 2:
        return None
    factors = {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "all_gather": float(ranks - 1),
        "reduce_scatter": (ranks - 1) / ranks,
        "all_to_all": (ranks - 1) / ranks,
        "broadcast": 1.0,
        "reduce": 1.0,
    }
    return size * factors[op] if op in factors else None


def communication_of(store: Store, run: Run, first: int | None, last: int | None) -> dict[str, Any]:
    """Communication of the steps [first, last] of a run.

    Returns:
        from, to (the steps that were read), steps, ranks, bytes and wait_s [rank][rank] (sums over those steps;
        None where two ranks share no group), unplaced_bytes (broadcasts: their root is not recorded), groups
        [{group, op, ranks, calls, bytes, transfer_s, bus_bandwidth, wait_s, incomplete}], per_rank [{rank,
        step_s, exposed_s, wait_s}] and exposed_share, wait_share of the mean rank's time.
    Raises:
        BadQueryError: the range is upside down.
    """
    if first is not None and last is not None and first > last:
        raise BadQueryError(f"from={first} lies after to={last}", "give the earlier step as from")
    bounds = _bounds(store, run.number, first, last)
    if bounds is None:
        return {"from": first, "to": last, "steps": 0, "ranks": [], "bytes": [], "wait_s": [], "groups": [],
                "unplaced_bytes": 0, "per_rank": [], "exposed_share": None, "wait_share": None}  # fmt: skip
    where = f"step BETWEEN {bounds[0]} AND {bounds[1]}"
    tables = read_tables(store, run.number, [], where, ("steps", "collectives"))
    return {"from": bounds[0], "to": bounds[1], **summary(run.described, tables)}


def summary(described: dict[str, Any], tables: Tables) -> dict[str, Any]:
    """The answer of `communication_of` but its range, from records alone."""
    rows = tables.collectives
    steps = tables.steps
    world = range(int(described.get("world_size") or 0))
    ranks = np.union1d(np.union1d(rows["rank"], steps["rank"]), np.array(world, "<i4"))
    ranks = ranks[ranks >= 0]
    matrices = _Matrices(ranks)
    groups = [_group(part, matrices) for part in _parts(described, tables, ranks)]
    per_rank = _per_rank(steps, rows, ranks, matrices)
    known = [each for each in per_rank if each["step_s"]]
    total = sum(each["step_s"] for each in known)
    return {
        "steps": len(np.unique(steps["step"])),
        "ranks": ranks.tolist(),
        "bytes": _listed(matrices.bytes),
        "wait_s": _listed(matrices.wait),
        "unplaced_bytes": matrices.unplaced,
        "groups": groups,
        "per_rank": per_rank,
        "exposed_share": sum(each["exposed_s"] for each in known) / total if total else None,
        "wait_share": sum(each["wait_s"] for each in known) / total if total else None,
    }


@dataclass(frozen=True)
class _Part:
    """The collectives of one group and operation, and who belongs to the group."""

    group: str
    op: str
    members: tuple[int, ...]
    rows: Table


class _Matrices:
    """Rank × rank sums; NaN where two ranks share no group."""

    def __init__(self, ranks: Column) -> None:
        self.place = {rank: index for index, rank in enumerate(ranks.tolist())}
        self.bytes = np.full((len(ranks), len(ranks)), np.nan)
        self.wait = np.full((len(ranks), len(ranks)), np.nan)
        self.unplaced = 0

    def join(self, matrix: Column, members: Column) -> None:
        """Let these ranks know each other: what was never seen between them is then 0."""
        block = np.ix_(members, members)
        matrix[block] = np.nan_to_num(matrix[block])

    def places(self, ranks: Any) -> Column:
        """Rows of ranks."""
        return np.array([self.place[int(rank)] for rank in ranks], np.intp)


def _bounds(store: Store, run: int, first: int | None, last: int | None) -> tuple[int, int] | None:
    where = f"run = {run} AND step >= {first if first is not None else 0}"
    where += f" AND step <= {last}" if last is not None else ""
    found = store.query(
        f"SELECT min(step) AS low, max(step) AS high, count() AS rows FROM lens.collectives WHERE {where}"
    ).to_pylist()[0]
    if not found["rows"]:
        return None
    low, high = int(found["low"]), int(found["high"])
    if found["rows"] > MOST_ROWS:
        low = max(low, high + 1 - max(1, int((high - low + 1) * MOST_ROWS / found["rows"])))
    return low, high


def _parts(described: dict[str, Any], tables: Tables, ranks: Column) -> list[_Part]:
    rows = tables.collectives
    closed = (rows["t1_ns"] != NULL) & (rows["rank"] >= 0) & (rows["group"] >= 0)
    names = {code: tables.strings[code] for code in np.unique(np.append(rows["group"], rows["op"])) if code >= 0}
    parts = []
    for group, op in sorted({(int(g), int(o)) for g, o in zip(rows["group"], rows["op"], strict=True)}):
        chosen = closed & (rows["group"] == group) & (rows["op"] == op)
        if not chosen.any():
            continue
        part = {name: values[chosen] for name, values in rows.items()}
        members = _members(described, names[group], ranks) or tuple(np.unique(part["rank"]).tolist())
        parts.append(_Part(names[group], names[op], members, part))
    return sorted(parts, key=lambda part: (part.group, part.op))


def _members(described: dict[str, Any], group: str, ranks: Column) -> tuple[int, ...]:
    pair = _POINT_TO_POINT.search(group)
    if pair:
        return int(pair[1]), int(pair[2])
    kind, _, index = group.partition("/")
    lists = (described.get("groups") or {}).get(kind)
    if lists and index.isdigit() and int(index) < len(lists):
        return tuple(int(rank) for rank in lists[int(index)])
    return tuple(ranks.tolist()) if group == "world/0" else ()


def _group(part: _Part, matrices: _Matrices) -> dict[str, Any]:
    rows, members = part.rows, part.members
    known = np.isin(rows["rank"], list(matrices.place)) & np.isin(rows["rank"], members)
    rows = {name: values[known] for name, values in rows.items()}
    _place_bytes(part, rows, matrices)
    order = np.lexsort((rows["t0_ns"], rows["seq"]))
    seq, rank, entry = rows["seq"][order], rows["rank"][order], rows["t0_ns"][order]
    left, done = rows["t1_ns"][order], rows["t_done_ns"][order]
    starts = np.flatnonzero(np.diff(seq, prepend=NULL))
    counts = np.diff(np.append(starts, len(seq)))
    # Sorted by entry within a collective: the last row is the last to enter.
    whole = (counts == len(members)) & (counts > 1)
    final = np.repeat(starts + counts - 1, counts)
    kept = np.repeat(whole, counts)
    begin = held_from(rows)[order]
    wait = np.clip(entry[final] - begin, 0, np.maximum(left - begin, 0))
    wait = np.where((begin == NULL) | ~kept, 0, wait) / _NS
    if whole.any():
        matrices.join(matrices.wait, matrices.places(members))
        at = (matrices.places(rank[kept]), matrices.places(rank[final][kept]))
        others = at[0] != at[1]
        np.add.at(matrices.wait, (at[0][others], at[1][others]), wait[kept][others])
    end = np.where(done != NULL, done, left)
    transfer = np.add.reduceat((end - entry[final]) / _NS, starts) / counts if len(starts) else np.empty(0)
    size = np.where(rows["bytes"][order] == NULL, np.nan, rows["bytes"][order].astype(float))
    mean_size = np.add.reduceat(size, starts) / counts if len(starts) else np.empty(0)
    timed = whole & (transfer > 0) & ~np.isnan(mean_size)
    moved = bus_bytes(part.op, float(mean_size[timed].sum()), len(members))
    seconds = float(transfer[timed].sum())
    return {
        "group": part.group,
        "op": part.op,
        "ranks": sorted(members),
        "calls": len(starts),
        "incomplete": int((~whole).sum()),
        "bytes": None if np.isnan(size).all() else float(np.nansum(size)),
        "transfer_s": float(transfer[whole].clip(min=0).sum()) if whole.any() else None,
        "bus_bandwidth": moved / seconds if moved and seconds else None,
        "wait_s": float(wait.sum()) if whole.any() else None,
    }


def _place_bytes(part: _Part, rows: Table, matrices: _Matrices) -> None:
    """Add what each rank gave to its peers; splits are taken as even: only sizes of whole buffers are known."""
    known = rows["bytes"] != NULL
    rank, size = rows["rank"][known], rows["bytes"][known]
    count = len(part.members)
    if part.op == "send":
        target = np.where(rows["peer"][known] >= 0, rows["peer"][known], part.members[-1])
        placed = np.isin(target, list(matrices.place))
        at = (matrices.places(rank[placed]), matrices.places(target[placed]))
        matrices.bytes[at] = np.nan_to_num(matrices.bytes[at])
        np.add.at(matrices.bytes, at, size[placed])
    elif part.op in _TO_EACH_PEER and count > 1:
        share = 1.0 if part.op == "all_gather" else _TO_EACH_PEER[part.op] / count
        members = matrices.places([each for each in part.members if each in matrices.place])
        matrices.join(matrices.bytes, members)
        for each in np.unique(rank).tolist():
            own = matrices.place[each]
            others = members[members != own]
            matrices.bytes[own, others] += size[rank == each].sum() * share
    elif part.op in ("broadcast", "reduce"):
        matrices.unplaced += int(size.sum())


def _per_rank(steps: Table, rows: Table, ranks: Column, matrices: _Matrices) -> list[dict[str, Any]]:
    result = []
    waits = np.nansum(matrices.wait, axis=1)
    known = np.isin(rows["rank"], ranks)
    place = np.searchsorted(ranks, rows["rank"][known])
    held_s = np.zeros(len(ranks))
    sums = held_seconds({name: values[known] for name, values in rows.items()}, place)
    held_s[: len(sums)] = sums
    for index, rank in enumerate(ranks.tolist()):
        ended = (steps["rank"] == rank) & (steps["t1_ns"] != NULL)
        held = float(held_s[index])
        spent = float((steps["t1_ns"][ended] - steps["t0_ns"][ended]).sum()) / _NS
        wait = min(float(waits[index]), held)
        result.append({"rank": rank, "step_s": spent or None, "exposed_s": held - wait, "wait_s": wait})
    return result


def _listed(matrix: Column) -> list[list[float | None]]:
    """Rows of a matrix; the diagonal and what is not known are None."""
    np.fill_diagonal(matrix, np.nan)
    return [[None if value != value else value for value in row] for row in matrix.tolist()]
