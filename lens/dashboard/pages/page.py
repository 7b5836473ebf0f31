"""What the shell needs to know of a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dash.development.base_component import Component


@dataclass(frozen=True)
class Page:
    """A page of the dashboard."""

    name: str
    """Names its section in the document and its code in `assets/`."""
    title: str
    """What the navigation shows."""
    path: str | None
    """What follows `/run/ID/` in the address ("" = the run's first page); None: not a page of a run."""
    key: str
    """Pressed after `g`, opens the page."""
    shows: str
    """One sentence that tells a stranger what the page is for; the help shows it."""
    layout: Callable[[], list[Component]]
    """Builds its content, once, when the server starts."""
