"""The agent of one host: reads what its training processes record, polls its cards, ships both to the server.

One agent a host is enough; a second one says so and ends. It keeps everything on disk while the server is away.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lens.cli.errors import missing_extra
from lens.cli.options import add_data, add_server, settings_of

HELP = "ship what this host's ranks record (started by itself)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_server(parser)
    add_data(parser)
    parser.add_argument("--host", metavar="NAME", help="this host's name (default: its hostname, or LENS_HOST)")
    parser.add_argument(
        "--simulate", metavar="CARD:N", help="simulate N cards, such as H200:2; every sample says so"
    )
    parser.add_argument("--spool", metavar="DIR", type=Path, help="where batches wait for the server")


def run(arguments: argparse.Namespace) -> int:
    """Run until no training process is left, or until told to end."""
    try:
        from lens.collectors.agent import run_agent
    except ImportError as error:
        raise missing_extra(error, "all") from error
    settings = settings_of(arguments, host=arguments.host, simulate=arguments.simulate, spool=arguments.spool)
    return run_agent(settings)
