"""One file a page. A new page is a module here with a `PAGE`, and its line in `PAGES`."""

from __future__ import annotations

from lens.dashboard.pages import communication, experts, hardware, memory, overview, ranks, runs, steps
from lens.dashboard.pages.page import Page

PAGES: tuple[Page, ...] = (
    runs.PAGE,
    overview.PAGE,
    steps.PAGE,
    ranks.PAGE,
    communication.PAGE,
    experts.PAGE,
    memory.PAGE,
    hardware.PAGE,
)
