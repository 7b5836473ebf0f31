"""The Dash application: document, header, navigation and the sections of all pages.

All pages lie in one layout and `assets/lens.js` shows the one that the address names, so that going from page to
page costs no request. No page here uses `dash.dcc`, whose scripts, with Plotly's, weigh more than all others
together: they are left out of the document.
"""

from __future__ import annotations

import json
from pathlib import Path

import dash
import dash_mantine_components as dmc
from dash import html
from dash.development.base_component import Component
from fastapi import FastAPI

from lens.dashboard.components import page_section
from lens.dashboard.pages import PAGES
from lens.dashboard.pages.page import Page

ASSETS = Path(__file__).parent / "assets"
NO_MODULES = ("theme.js", "vendor")
MODULES = tuple(
    sorted(
        str(path)
        for found in ASSETS.rglob("*.js")
        if (path := found.relative_to(ASSETS)).parts[0] not in NO_MODULES
    )
)
UNUSED_SCRIPTS = ("/dash/dcc/", "/dash/dash_table/", "/dash/deps/polyfill")

INDEX = """<!DOCTYPE html>
<html lang="en">
  <head>
    {%metas%}
    <title>{%title%}</title>
    <meta name="color-scheme" content="light dark">
    <link rel="icon" type="image/svg+xml" href="/assets/lens.svg">
    <script src="/assets/theme.js"></script>
    <link rel="stylesheet" href="/assets/vendor/uPlot.min.css">
    <link rel="stylesheet" href="/assets/lens.css">
    %(preloads)s
    {%css%}
  </head>
  <body>
    {%app_entry%}
    <footer>
      {%config%}
      <script defer src="/assets/vendor/uPlot.iife.min.js"></script>
      <script type="module" src="/assets/lens.js"></script>
      {%scripts%}
      {%renderer%}
    </footer>
  </body>
</html>
"""
BOOT = """<div id="react-entry-point"><div class="lens-boot" role="status">
<span class="lens-brand">lens</span><span>opening the run…</span></div></div>"""


class LensDash(dash.Dash):  # type: ignore[misc]
    """Dash without the script bundles that no page uses, and with a first picture before any script ran."""

    def interpolate_index(self, **parts: str) -> str:
        """The document; see `dash.Dash.interpolate_index`."""
        lines = parts["scripts"].splitlines()
        parts["scripts"] = "\n".join(line for line in lines if not any(part in line for part in UNUSED_SCRIPTS))
        parts["app_entry"] = BOOT
        return str(super().interpolate_index(**parts))


def build(server: FastAPI) -> dash.Dash:
    """The Dash app on this server; it takes every GET that no other route of the server answers."""
    preloads = "\n    ".join(f'<link rel="modulepreload" href="/assets/{name}">' for name in MODULES)
    app = LensDash(
        __name__,
        server=server,
        assets_folder=str(ASSETS),
        assets_ignore=".*",  # the document names its files itself: modules import each other
        index_string=INDEX.replace("%(preloads)s", preloads),
        title="lens",
        update_title="",
        use_pages=False,
        add_log_handler=False,
    )
    app.layout = layout()
    return app


def layout() -> Component:
    """Header and all pages, each hidden until the address names it."""
    header = html.Header(
        [
            html.A("Skip to content", href="#content", className="lens-skip"),
            html.A(
                [html.Span(className="lens-mark", **{"aria-hidden": "true"}), "lens"],
                href="/",
                className="lens-brand",
                **{"data-go": "/", "aria-label": "lens, all runs"},
            ),
            html.Div(id="run-name", className="lens-run-name"),
            html.Nav(_navigation(), id="navigation", className="lens-nav", hidden=True, **{"aria-label": "Pages"}),
            html.Div(id="status", className="lens-status", role="status"),
            html.Div(
                [
                    _icon("theme-toggle", "Dark or light colours", html.Span(className="lens-icon-theme")),
                    _icon("help-open", "What this page shows, and keys", html.Span("?")),
                ],
                className="lens-icons",
            ),
        ],
        className="lens-header",
    )
    pages = [page_section(page.name, page.title, page.layout()) for page in PAGES]
    content = html.Main(
        [html.Div(id="notice", className="lens-notice", role="alert", hidden=True), *pages],
        id="content",
        **{"data-pages": json.dumps([_described(page) for page in PAGES])},
    )
    return dmc.MantineProvider(
        html.Div([header, content]),
        defaultColorScheme="auto",
        theme={"fontFamily": "inherit", "primaryColor": "blue"},
    )


def _icon(identifier: str, label: str, sign: Component) -> Component:
    hidden = html.Span(sign, **{"aria-hidden": "true"})
    return html.Button(
        hidden, id=identifier, type="button", title=label, className="lens-icon", **{"aria-label": label}
    )


def _navigation() -> list[Component]:
    return [
        html.A(page.title, href="#", **{"data-nav": page.name, "data-path": page.path or ""})
        for page in PAGES
        if page.path is not None
    ]


def _described(page: Page) -> dict[str, str | None]:
    return {"name": page.name, "title": page.title, "path": page.path, "key": page.key, "shows": page.shows}
