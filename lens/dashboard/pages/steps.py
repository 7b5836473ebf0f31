"""Steps: what each step was spent on, and one step as every rank lived it."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash.development.base_component import Component

from lens.dashboard.components import panel, slot
from lens.dashboard.pages.page import Page


def layout() -> list[Component]:
    """Stack of phases, then the lanes of the chosen step."""
    return [
        panel(
            "stack",
            "What each step is spent on",
            "The phases of a step, stacked, as the median rank has them; the top is the whole step. Click a step "
            "to see below what every rank did in it.",
            identifier="step-stack",
            height=280,
            wide=True,
        ),
        slot("steps-controls", "lens-controls lens-controls-between"),
        panel(
            "lanes",
            "One step, rank by rank",
            "Bars are phases, the thin bars below them are collectives. A hatched one waits: its rank came early "
            "and the last had not come yet. The rank that never waits is the one that the others wait for.",
            identifier="step-lanes",
            wide=True,
            height=260,
        ),
        dmc.Space(h="lg"),
    ]


PAGE = Page(
    name="steps",
    title="Steps",
    path="steps",
    key="s",
    shows="What each step is spent on; and one step as every rank lived it, its waits hatched.",
    layout=layout,
)
