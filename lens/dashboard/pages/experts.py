"""Experts: which of them get the tokens, how even that is, and what is dropped."""

from __future__ import annotations

import dash_mantine_components as dmc
from dash.development.base_component import Component

from lens.dashboard.components import grid, panel, slot
from lens.dashboard.pages.page import Page


def layout() -> list[Component]:
    """Numbers, the map of layers and experts, and how they change over the steps."""
    return [
        slot("experts-numbers", "lens-numbers lens-numbers-first"),
        panel(
            "expert-map",
            "Tokens of each expert",
            "One row a layer, one column an expert: the tokens its router sends it in a step, before any is "
            "dropped. Rows should be of one colour; a bright cell is an expert that its rank works longer for.",
            identifier="expert-map",
            wide=True,
        ),
        grid(
            panel(
                "expert-shape",
                "Load imbalance",
                "The busiest expert's tokens by the mean of its layer; 1 is even. All ranks wait for the busiest.",
                identifier="expert-imbalance",
                metric="imbalance",
            ),
            panel(
                "expert-shape",
                "Evenness of the load",
                "Entropy of the tokens over the experts, 1 when all get the same. A fall towards 0 is a collapse.",
                identifier="expert-evenness",
                metric="evenness",
            ),
        ),
        panel(
            "expert-drops",
            "Tokens dropped",
            "Share of the routed tokens beyond an expert's capacity: the model learns nothing from them there.",
            identifier="expert-drops",
            wide=True,
            height=180,
        ),
        dmc.Space(h="lg"),
    ]


PAGE = Page(
    name="experts",
    title="Experts",
    path="experts",
    key="e",
    shows="How many tokens each expert gets, how even that is, what is dropped, and what waiting for the busiest costs.",
    layout=layout,
)
