"""Store, API and dashboard in one process, on this machine only unless told otherwise.

Prints a ready URL with a random token; the token lies in the data folder, readable by you alone. What a run has
recorded before there was a server is taken in by itself.
Ctrl-C ends it; what was acknowledged is on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import webbrowser

from lens.cli.errors import UNREACHABLE, CommandError, missing_extra
from lens.cli.options import add_data, settings_of
from lens.reading.connection import owner_of
from lens.ring_files import RecorderError
from lens.settings import Settings

HELP = "store and dashboard on 127.0.0.1:8321"
DEFAULT_PORT = 8321


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_data(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--public", action="store_true", help="allow an address that other machines can reach")
    parser.add_argument(
        "--otlp-grpc", type=int, metavar="PORT", help="take OpenTelemetry metrics over gRPC too (usually 4317)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def run(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    settings = settings_of(arguments)
    owner = owner_of(settings.data)
    if owner:
        raise CommandError(
            f"a server already owns {settings.data}: {owner['url']} (process {owner['pid']})",
            "open that one, stop it, or name another folder with --data",
            UNREACHABLE,
        )
    try:
        from lens import dashboard
        from lens.store import server
        from lens.store.errors import StoreError
    except ImportError as error:
        raise missing_extra(error, "server") from error

    def ready(url: str) -> None:
        _ship_what_waits(settings)
        if arguments.json:
            print(json.dumps({"url": url, "data": str(settings.data)}), flush=True)
        else:
            print(f"lens is ready: {url}\ndata folder:   {settings.data.resolve()}\nCtrl-C ends it.", flush=True)
        if arguments.open:
            webbrowser.open(url)

    try:
        return int(
            server.serve(
                settings,
                arguments.host,
                arguments.port,
                ready=ready,
                mount=dashboard.mount,
                public=arguments.public,
                otlp_grpc=arguments.otlp_grpc,
            )
        )
    except ImportError as error:
        raise missing_extra(error, "grpc") from error
    except StoreError as error:
        raise CommandError(str(error), error.hint, UNREACHABLE) from error
    except OSError as error:
        raise CommandError(
            f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror or error}",
            "another port: --port 0 takes a free one",
            UNREACHABLE,
        ) from error


def _ship_what_waits(settings: Settings) -> None:
    """Start this host's agent if records of a run wait in the data folder: no other may come to bring them."""
    if settings.agent and any(settings.spool.glob("*/*.segment")):
        from lens.collectors.agent import ensure_agent

        with contextlib.suppress(OSError, RecorderError):
            ensure_agent(settings)
