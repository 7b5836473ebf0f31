"""The pages: a Dash shell on the server's own FastAPI app; what streams is drawn by `assets/lens.js`."""

from __future__ import annotations

from fastapi import FastAPI


def mount(app: FastAPI) -> None:
    """Attach the pages to the server's app, after its own routes.

    The pages read over HTTP and the live websocket like any other client; `app.state.query` and `app.state.live`
    must be there before the first request.
    """
    from lens.dashboard.serving import PageHeaders
    from lens.dashboard.shell import build

    dash_app = build(app)
    app.add_middleware(PageHeaders, script_hashes=tuple(dash_app.csp_hashes()))
