"""Runs as they are described: what counts as a description, and how a later one is merged with what is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lens.store.errors import StoreError

RUN_ID = re.compile(r"[^\x00-\x1f\x7f/\\?#%]{1,128}")
PROJECT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}")
_OBJECTS = ("experts", "config", "data_versions")


class BadRunError(StoreError):
    """A description of a run that cannot be used."""


@dataclass
class Run:
    """One run: the store's number for it, when it was first heard of, and all that is known about it."""

    number: int
    created_ns: int
    described: dict[str, Any]
    version: int = 0
    """Offset in the log after the newest description merged."""

    @property
    def id(self) -> str:
        """The run's id, as its users write it."""
        return str(self.described["run"])

    @property
    def world_size(self) -> int | None:
        """Ranks of the run; from the topology where nobody said; None if unknown."""
        given = self.described.get("world_size")
        return given if given is not None else len(self.described.get("ranks") or ()) or None


def checked(described: Any) -> dict[str, Any]:
    """The description, if it is one.

    Raises:
        BadRunError: not an object, no usable id, or a field of the wrong kind.
    """
    if not isinstance(described, dict):
        raise BadRunError("a run is described by a JSON object", 'send {"run": "my-run", "world_size": 4}')
    run = described.get("run")
    if not isinstance(run, str) or not RUN_ID.fullmatch(run) or run in (".", ".."):
        raise BadRunError(
            "run: an id of 1 to 128 characters without / \\ ? # % is needed", 'send {"run": "my-run"}'
        )
    for key, kind in _KINDS.items():
        if described.get(key) is not None and not kind[0](described[key]):
            raise BadRunError(f"{key}: {kind[1]}", "see POST /api/v1/runs in docs/api.md")
    return {key: value for key, value in described.items() if value is not None and key != "type"}


def merged(known: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """What is known, with what was said now: newer wins, lists of ranks and tags grow, nothing known is unsaid."""
    result = {**known, **said}
    if known.get("project"):
        result["project"] = known["project"]  # a run stays where it is, whoever describes it
    if known.get("ranks") or said.get("ranks"):
        result["ranks"] = _merged_ranks(known.get("ranks") or [], said.get("ranks") or [])
    for key in _OBJECTS:
        if key in known and key in said:
            result[key] = {**known[key], **said[key]}
    if "groups" in known and "groups" in said:
        result["groups"] = dict(known["groups"])
        for kind, lists in said["groups"].items():
            # A host that knows only its own groups must not shorten the list: a group's number is its place in it.
            if len(lists) >= len(result["groups"].get(kind, ())):
                result["groups"][kind] = lists
    if "tags" in known and "tags" in said:
        result["tags"] = list(dict.fromkeys([*known["tags"], *said["tags"]]))
    return result


def _merged_ranks(known: list[dict[str, Any]], said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_rank = {entry["rank"]: entry for entry in known}
    for entry in said:
        present = {key: value for key, value in entry.items() if value is not None}
        by_rank[entry["rank"]] = {**by_rank.get(entry["rank"], {}), **present}
    return [by_rank[rank] for rank in sorted(by_rank)]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _are_ranks(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, dict) and _is_whole(v.get("rank")) for v in value)


def _are_groups(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(lists, list)
        and all(isinstance(ranks, list) and all(_is_whole(rank) for rank in ranks) for ranks in lists)
        for lists in value.values()
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_KINDS: dict[str, tuple[Any, str]] = {
    "name": (lambda value: isinstance(value, str), "text is needed"),
    "project": (
        lambda value: isinstance(value, str) and PROJECT_NAME.fullmatch(value) is not None,
        "1 to 64 letters, digits and _ . @ - are needed",
    ),
    "world_size": (lambda value: _is_whole(value) and value > 0, "a whole number from 1 on is needed"),
    "ranks": (_are_ranks, "a list of objects, each with its rank, is needed"),
    "groups": (_are_groups, "an object of lists of lists of ranks is needed"),
    "tags": (_are_texts, "a list of text is needed"),
    **{key: (lambda value: isinstance(value, dict), "an object is needed") for key in _OBJECTS},
}
