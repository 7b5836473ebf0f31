"""Who is who: the ranks of a run, their hosts, cards, groups, pipeline stages and experts.

Taken from the run object; what it does not say is derived from the records, and `derived` names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lens.diagnosis.arrays import Array, Ints, pack, starts_of
from lens.tables import SCHEMA, Tables


@dataclass(frozen=True)
class Topology:
    """Ranks by number; every list and array below is in the order of `ranks`.

    ranks: global ranks, known or reporting, ascending [R].
    kind: ranks of equal kind do equal work on equal cards (stage, vendor, model) [R].
    members: group name, like "dp/0", to its global ranks. nic: like "host3/mlx5_0", the port a rank sends through.
    """

    world_size: int
    ranks: Ints
    host: list[str | None]
    device: list[str | None]
    vendor: list[str | None]
    model: list[str | None]
    nic: list[str | None]
    switch: list[str | None]
    stage: list[int | None]
    kind: Ints
    members: dict[str, tuple[int, ...]]
    experts: Mapping[str, Any]
    config: Mapping[str, Any]
    derived: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, run: Mapping[str, Any], tables: Tables) -> Topology:
        """Merge what the run object says with what the records show."""
        described = {int(item["rank"]): item for item in run.get("ranks") or () if item.get("rank") is not None}
        seen = reporting_ranks(tables)
        declared = run.get("world_size")
        known = set(described) | set(seen.tolist())
        for lists in (run.get("groups") or {}).values():
            known.update(int(rank) for members in lists for rank in members)
        if declared:
            known.update(range(int(declared)))
        ranks = np.array(sorted(known), np.int64)
        about = [described.get(int(rank), {}) for rank in ranks]
        shown = _places(tables)
        host = [_text(a, "host") or shown.get(int(r), (None, None))[0] for r, a in zip(ranks, about, strict=True)]
        device = [
            _text(a, "device") or shown.get(int(r), (None, None))[1] for r, a in zip(ranks, about, strict=True)
        ]
        host = [h or (d.split("/")[0] if d and "/" in d else None) for h, d in zip(host, device, strict=True)]
        derived = tuple(
            name
            for name, missing in (
                ("ranks", bool(len(ranks)) and not described),
                ("groups", not run.get("groups")),
                ("world_size", not declared),
            )
            if missing
        )
        declared_groups = _declared_groups(run) if run.get("groups") else {}
        stage = _stages(ranks, declared_groups)
        members = {**_groups_seen(tables, declared_groups), **declared_groups}
        vendor, model = [_text(a, "vendor") for a in about], [_text(a, "model") for a in about]
        kinds = {key: number for number, key in enumerate(sorted(set(_kind_keys(stage, vendor, model))))}
        kind = np.array([kinds[key] for key in _kind_keys(stage, vendor, model)], np.int64)
        return cls(
            int(declared) if declared else len(ranks),
            ranks, host, device, vendor, model, _ports(about, host), [_text(a, "switch") for a in about],
            stage, kind, members,
            run.get("experts") or {}, run.get("config") or {}, derived,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ranks)

    def row(self, rank: Array) -> Ints:
        """Places of global ranks in `ranks`; -1 for the absent rank."""
        if not len(self.ranks):
            return np.full(np.shape(rank), -1, np.int64)
        place = np.minimum(np.searchsorted(self.ranks, rank), len(self.ranks) - 1)
        return np.where(self.ranks[place] == rank, place, -1)

    def host_index(self) -> Ints:
        """A number per host; a rank whose host is unknown counts as a host (a clock) of its own."""
        names = {name: number for number, name in enumerate(sorted({h for h in self.host if h}))}
        return np.array([names[h] if h else len(names) + i for i, h in enumerate(self.host)], np.int64)

    def shared_fates(self) -> list[tuple[str, set[int]]]:
        """Sets of places in `ranks` that one cause can hit together: a host, a stage, the owners of an expert."""
        sets: dict[tuple[str, Any], set[int]] = {}
        for place in range(len(self.ranks)):
            if self.host[place] is not None:
                sets.setdefault(("host", self.host[place]), set()).add(place)
            if self.stage[place] is not None:
                sets.setdefault(("stage", self.stage[place]), set()).add(place)
        for name, members in self.members.items():
            if name.split("/")[0] == "ep":
                for position, place in enumerate(self.row(np.array(members, np.int64)).tolist()):
                    sets.setdefault(("expert", (self.stage[place], position)), set()).add(place)
        return [(name[0], places) for name, places in sets.items() if 1 < len(places) < len(self.ranks)]

    def ranks_of_host(self, host: str) -> list[int]:
        """Global ranks on a host, ascending."""
        return [int(rank) for rank, name in zip(self.ranks, self.host, strict=True) if name == host]

    def component(self, ranks: list[int]) -> str | None:
        """Where these ranks sit: their card, else their host, else None when they share nothing."""
        rows = self.row(np.array(ranks, np.int64)).tolist()
        if not rows or min(rows) < 0:
            return None
        devices, hosts = {self.device[row] for row in rows}, {self.host[row] for row in rows}
        if len(devices) == 1 and None not in devices:
            return self.device[int(rows[0])]
        return self.host[int(rows[0])] if len(hosts) == 1 else None

    def members_of(self, group: str) -> tuple[int, ...]:
        """Global ranks of a group, those of point to point ("pp/0:3-7") read from its name; () when unknown."""
        known = self.members.get(group)
        pair, listed = POINT_TO_POINT.fullmatch(group), LISTED.fullmatch(group)
        if pair:
            return int(pair[1]), int(pair[2])
        if listed:
            return tuple(int(rank) for rank in listed[1].split(","))
        return known or ()

    def groups_of(self, rank: int, kind: str) -> list[tuple[int, ...]]:
        """The groups of a kind ("ep") that this rank is in."""
        return [m for name, m in self.members.items() if name.split("/")[0] == kind and rank in m]


def reporting_ranks(tables: Tables) -> Ints:
    """Global ranks that any record bears, and those a pre-reduced vector covers."""
    found = [np.unique(tables.table(name)["rank"]) for name in SCHEMA]
    ranks = np.unique(np.concatenate(found)).astype(np.int64)
    vectors = tables.vectors
    over_ranks = np.isin(vectors["metric"], [tables.code(name) for name in PRE_REDUCED]) & (vectors["rank"] < 0)
    widest = int(vectors["length"][over_ranks].max(initial=0))
    ranks = np.union1d(ranks, np.arange(widest))
    return ranks[ranks >= 0]


PRE_REDUCED = ("step.duration", "phase.duration", "comm.self", "comm.wait", "comm.transfer")


POINT_TO_POINT = re.compile(r"[^:]+:(\d+)-(\d+)")
LISTED = re.compile(r"ranks/(\d+(?:,\d+)*)(?:#\d+)?")


def _ports(about: list[Mapping[str, Any]], host: list[str | None]) -> list[str | None]:
    """The network port of each rank by its full name."""
    names = [_text(a, "nic") for a in about]
    return [
        name if name is None or "/" in name or h is None else f"{h}/{name}"
        for name, h in zip(names, host, strict=True)
    ]


def _text(about: Mapping[str, Any], key: str) -> str | None:
    value = about.get(key)
    return value if isinstance(value, str) and value else None


def _places(tables: Tables) -> dict[int, tuple[str | None, str | None]]:
    """Host and device of each rank as its samples and events bear them (the smallest names, whatever came first)."""
    found: dict[int, tuple[set[str], set[str]]] = {}
    for table in (tables.samples, tables.events):
        borne = table["rank"] >= 0
        columns = [table[name][borne] for name in ("rank", "host", "device")]
        once = np.unique(pack(*columns), return_index=True)[1]
        for rank, host, device in zip(*(column[once].tolist() for column in columns), strict=True):
            hosts, devices = found.setdefault(rank, (set(), set()))
            if host >= 0:
                hosts.add(tables.strings[host])
            if device >= 0:
                devices.add(tables.strings[device])
    return {rank: (min(h, default=None), min(d, default=None)) for rank, (h, d) in found.items()}


def _declared_groups(run: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        f"{kind}/{index}": tuple(int(rank) for rank in members)
        for kind, lists in sorted(run["groups"].items())
        for index, members in enumerate(lists)
    }


def _groups_seen(tables: Tables, declared: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Groups that were not declared, by who was seen in them."""
    table = tables.collectives
    borne = (table["rank"] >= 0) & (table["group"] >= 0)
    borne &= ~np.isin(table["group"], [tables.code(name) for name in declared])
    if not borne.any():
        return {}
    group, rank = table["group"][borne], table["rank"][borne]
    order = np.argsort(pack(group, rank), kind="stable")
    group, rank = group[order], rank[order]
    once = starts_of(pack(group, rank))
    members: dict[str, list[int]] = {}
    for code, member in zip(group[once].tolist(), rank[once].tolist(), strict=True):
        members.setdefault(tables.strings[code], []).append(member)
    return {name: tuple(members[name]) for name in sorted(members)}


def _stages(ranks: Ints, declared: Mapping[str, tuple[int, ...]]) -> list[int | None]:
    """Position of each rank in its pipeline; None without one."""
    stage: dict[int, int] = {}
    for name, group in declared.items():
        if name.split("/")[0] == "pp":
            stage.update({rank: position for position, rank in enumerate(group)})
    return [stage.get(int(rank)) for rank in ranks]


def _kind_keys(stage: list[int | None], vendor: list[str | None], model: list[str | None]) -> list[tuple[Any, ...]]:
    return [(-1 if s is None else s, v or "", m or "") for s, v, m in zip(stage, vendor, model, strict=True)]
