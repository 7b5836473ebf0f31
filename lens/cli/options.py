"""Options that several verbs share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lens.settings import Settings


def add_data(parser: argparse.ArgumentParser) -> None:
    """``--data DIR``: the data folder."""
    parser.add_argument("--data", metavar="DIR", type=Path, help="data folder (default: ./lens-data, or LENS_DATA)")


def add_server(parser: argparse.ArgumentParser) -> None:
    """``--server URL`` and ``--token TOKEN``: another server than the data folder's own."""
    parser.add_argument("--server", metavar="URL", help="a running server (default: the one that owns the folder)")
    parser.add_argument(
        "--token", metavar="TOKEN", help="its token (default: LENS_TOKEN, or the folder's token file)"
    )


def settings_of(arguments: argparse.Namespace, **more: Any) -> Settings:
    """Settings with the shared options that the verb has.

    Raises:
        SettingsError: a value cannot be used.
    """
    given = {name: getattr(arguments, name, None) for name in ("data", "server", "token")}
    return Settings.load(**given, **more)
