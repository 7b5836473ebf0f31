"""The runs of a data folder or server, newest first."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from lens.cli.errors import DONE
from lens.cli.options import add_data, add_server, settings_of
from lens.cli.reader import open_reader

HELP = "the runs that are stored"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_data(parser)
    add_server(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the runs."""
    settings = settings_of(arguments)
    reader = open_reader(settings)
    try:
        runs = reader.runs()
    finally:
        reader.close()
    if arguments.json:
        print(json.dumps({"runs": runs}))
        return DONE
    if not runs:
        print("no runs yet; make one with: lens demo")
        return DONE
    rows = [("RUN", "STATE", "RANKS", "LAST STEP", "STARTED", "NAME"), *(_row(entry) for entry in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return DONE


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    started = entry.get("started_ns")
    return (
        str(entry["run"]),
        str(entry.get("state", "n/a")),
        f"{_shown(entry.get('ranks_reporting'))} of {_shown(entry.get('world_size'))}",
        _shown(entry.get("last_step")),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started / 1e9)) if started else "n/a",
        _shown(entry.get("name")),
    )


def _shown(value: Any) -> str:
    return "n/a" if value is None else str(value)
