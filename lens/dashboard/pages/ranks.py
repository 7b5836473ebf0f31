"""Ranks: one row a rank, one column a step; the rank that differs from its peers stands out."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash.development.base_component import Component

from lens.dashboard.components import panel, slot
from lens.dashboard.pages.page import Page


def layout() -> list[Component]:
    """Metric selector, heat map, series of the chosen ranks."""
    return [
        slot("ranks-controls", "lens-controls"),
        panel(
            "heatmap",
            "Every rank, every step",
            "Brighter is more; where several steps share a pixel, the highest is shown. Own time is what collectives "
            "leave of a step: ranks that wait for a slow one take as long as it does, but their own time stays short.",
            identifier="rank-map",
            wide=True,
            height=320,
        ),
        panel(
            "ranks",
            "Chosen ranks beside the median",
            "Click a row of the map to add its rank here. The dotted line is the median of all ranks.",
            identifier="rank-series",
            wide=True,
            height=240,
        ),
        dmc.Space(h="lg"),
    ]


PAGE = Page(
    name="ranks",
    title="Ranks",
    path="ranks",
    key="r",
    shows="One row a rank, one column a step: the rank that differs from its peers stands out.",
    layout=layout,
)
