"""Tokens for the runs of one project: what those who have one see of a server, and what becomes of what they send.

A run's project is the `project` of its description, said once. To such a token the runs of others do not exist; runs
that it describes, or that its metrics name, become runs of its project. Paths that are not listed are closed to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, MutableMapping
from typing import Any

from lens.store.errors import StoreError, UnknownRunError
from lens.store.registry import Registry
from lens.store.runs import Run

PROJECT = "lens.project"
"""Where a request's scope says which project its token is for; None for all."""
_RUN = re.compile(r"/api/v1/runs/([^/]+)(?:/.*)?", re.S)
_OPEN = re.compile(
    r"/api/v1/(?:runs|query|write)|/v1/metrics|/metrics|/openapi\.json|(?!/api/|/v1/|/metrics).*", re.S
)


class OtherProjectError(StoreError):
    """A run that somebody describes is there already, and not theirs."""

    def __init__(self, run: str) -> None:
        super().__init__(f"the run id {run!r} is taken by another project", "use another id")


def project_of(scope: MutableMapping[str, Any]) -> str | None:
    """The project that a request is confined to; None if it is not."""
    project: str | None = scope.get(PROJECT)
    return project


def belongs(run: Run, project: str | None) -> bool:
    """Whether a token of this project sees the run."""
    return project is None or run.described.get("project") == project


def those_of(runs: Iterable[Run], project: str | None) -> list[Run]:
    """The runs that a token of this project sees."""
    return [run for run in runs if belongs(run, project)]


def run_of(registry: Registry, run_id: str, project: str | None) -> Run:
    """The run of this id, for a token of this project.

    Raises:
        UnknownRunError: there is none that it sees.
    """
    run = registry.run(run_id)
    if not belongs(run, project):
        raise UnknownRunError(run_id)
    return run


def claimed(registry: Registry, described: Any, project: str | None) -> Any:
    """The description of a run as a run of this project.

    Raises:
        OtherProjectError: the run is known and not of it.
    """
    if project is None or not isinstance(described, dict):
        return described
    known = registry.find(described["run"]) if isinstance(described.get("run"), str) else None
    if known is not None and not belongs(known, project):
        raise OtherProjectError(known.id)
    return {**described, "project": project}


def is_open(path: str) -> bool:
    """Whether a token of one project may ask this path at all; which run it asks for is looked at by `named_run`."""
    return bool(_OPEN.fullmatch(path) or _RUN.fullmatch(path))


def named_run(path: str) -> str | None:
    """The run that a path names."""
    found = _RUN.fullmatch(path)
    return found[1] if found else None
