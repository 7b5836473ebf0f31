"""Runs: what this store holds, newest first."""

from __future__ import annotations

from dash import html
from dash.development.base_component import Component

from lens.dashboard.components import slot
from lens.dashboard.pages.page import Page


def layout() -> list[Component]:
    """The list, or the command that fills it."""
    return [
        html.Div(
            [html.H2("Runs"), html.P("Every training run this store has heard of, newest first.")],
            className="lens-page-head",
        ),
        slot("runs-list", "lens-runs"),
    ]


PAGE = Page(
    name="runs",
    title="Runs",
    path=None,
    key="l",
    shows="Every training run that this store has heard of, and whether it is alive.",
    layout=layout,
)
