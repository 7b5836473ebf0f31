"""Communication: who sends to whom, who waits for whom, and what of it training feels."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash.development.base_component import Component

from lens.dashboard.components import grid, panel, slot
from lens.dashboard.pages.page import Page


def layout() -> list[Component]:
    """Shares of the step, two maps of pairs, bandwidth of each group."""
    return [
        slot("communication-numbers", "lens-numbers lens-numbers-first"),
        grid(
            panel(
                "pairs",
                "Who waits for whom",
                "How long each rank stands in a collective until the last one comes. A bright column is a rank "
                "that the others wait for.",
                identifier="wait-map",
                metric="wait",
            ),
            panel(
                "pairs",
                "Who sends to whom",
                "Bytes that each rank gives to each other one, from the sizes of its collectives; a collective "
                "over several ranks is split evenly.",
                identifier="byte-map",
                metric="bytes",
            ),
        ),
        panel(
            "groups",
            "How fast each group is",
            "Bus bandwidth: bytes over the busiest link by the time from the last rank's entry to the exit. Groups "
            "of one kind should be equally fast; small messages never reach the speed of the link.",
            identifier="group-speed",
            wide=True,
            height=0,
        ),
        dmc.Space(h="lg"),
    ]


PAGE = Page(
    name="communication",
    title="Communication",
    path="communication",
    key="c",
    shows="Which rank the others wait for, who sends how much to whom, and how fast each group moves its bytes.",
    layout=layout,
)
