"""The pieces that pages are built of. Python says what a panel shows; `assets/panels/index.js` draws it.

A panel is a titled card with the tools that every picture has: its table, its PNG and its CSV.
"""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html
from dash.development.base_component import Component


def panel(
    kind: str,
    title: str,
    explanation: str,
    *,
    identifier: str,
    metric: str | None = None,
    height: int = 220,
    wide: bool = False,
    **more: str,
) -> Component:
    """A card in which `kind` (a key of the drawing table in `assets/panels/index.js`) is drawn.

    Args:
        kind: what draws it, such as "band" or "heatmap".
        title: what the picture shows, in the reader's words.
        explanation: one sentence that tells a stranger how to read it.
        identifier: unique on the page; names downloads.
        metric: the metric drawn; absent where the panel finds its own.
        height: of the drawing area in CSS pixels.
        wide: over the full width of the page.
        more: what else the drawing code needs, as data attributes.
    """
    data: dict[str, Any] = {"data-panel": kind, "data-height": str(height), "data-title": title}
    if metric is not None:
        data["data-metric"] = metric
    data |= {f"data-{name}": value for name, value in more.items()}
    return html.Section(
        [
            html.Header(
                [
                    html.Div(
                        [html.H2(title, id=f"{identifier}-title"), html.P(explanation)],
                        className="lens-panel-words",
                    ),
                    html.Div(className="lens-panel-tools"),
                ]
            ),
            html.Div(className="lens-panel-legend"),
            html.Div(className="lens-panel-body"),
        ],
        id=identifier,
        className="lens-panel lens-wide" if wide else "lens-panel",
        **{"aria-labelledby": f"{identifier}-title"},
        **data,
    )


def grid(*children: Component) -> Component:
    """Panels beside each other, as many as fit."""
    return html.Div(list(children), className="lens-grid")


def slot(identifier: str, class_name: str = "", **attributes: str) -> Component:
    """An empty place that the page's script fills."""
    return html.Div(id=identifier, className=class_name, **attributes)


def page_section(name: str, heading: str, children: list[Component]) -> Component:
    """One page: hidden until the address names it."""
    return html.Div(
        [dmc.VisuallyHidden(html.H1(heading)), *children],
        id=f"page-{name}",
        className="lens-page",
        hidden=True,
        **{"data-page": name},
    )
