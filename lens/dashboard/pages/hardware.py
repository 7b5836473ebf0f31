"""Hardware: hosts and cards of any vendor, and what each reports now."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash.development.base_component import Component

from lens.dashboard.components import panel
from lens.dashboard.pages.page import Page


def layout() -> list[Component]:
    """One box a host, in it one a card."""
    return [
        panel(
            "hardware",
            "Hosts and cards",
            "What each card reports now, against its own limits. “simulated” means that a model driven by the run "
            "stands in for the card. A triangle marks a card that the verdict names.",
            identifier="hardware-grid",
            wide=True,
            height=0,
        ),
        dmc.Space(h="lg"),
    ]


PAGE = Page(
    name="hardware",
    title="Hardware",
    path="hardware",
    key="h",
    shows="Every host with its cards and network ports, whoever made them, and what each reports now.",
    layout=layout,
)
