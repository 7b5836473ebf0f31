"""A run as it goes, rank by rank, in the terminal: pace, waiting, phase or collective, card, memory, age of data.

RUN is a run's id, its beginning, or `latest` (the default). The picture is drawn again in place until q or Ctrl-C;
arrows, j and k scroll where there are more ranks than lines. With --once or --json, or where the output is no
terminal, it is printed once. What is not known reads n/a. STEP TIME and WAITS are means of the last ten steps; the
rank that others wait for is the one that waits least.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import threading
import time
from typing import Any

from lens.cli.errors import DONE, UNUSABLE, CommandError
from lens.cli.options import add_data, add_server, settings_of
from lens.cli.reader import RunReader, ServerReader, choose_run, open_reader
from lens.cli.terminal import Line, Screen, is_live, paint, size, wants_colour
from lens.cli.top_view import hidden_ranks, view

HELP = "a run as it goes, rank by rank, in the terminal"
INTERVAL_S = 2.0
LEAST_INTERVAL_S = 0.2
VERDICT_EVERY_S = 5.0
VERDICT_SHARE = 5.0
"""A verdict re-reads the run: the next is asked for only after this many times what the last one took."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("run", metavar="RUN", nargs="?", default="latest")
    parser.add_argument("--once", action="store_true", help="print the picture once and end")
    parser.add_argument(
        "--interval",
        type=float,
        default=INTERVAL_S,
        metavar="S",
        help="seconds between pictures (default: %(default)s)",
    )
    add_data(parser)
    add_server(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show the run until told to end."""
    if not math.isfinite(arguments.interval) or arguments.interval < LEAST_INTERVAL_S:
        raise CommandError(
            f"--interval {arguments.interval} is too short", f"give {LEAST_INTERVAL_S} or more", UNUSABLE
        )
    reader = open_reader(settings_of(arguments))
    try:
        name = choose_run(reader, arguments.run)
        # A folder without a server does not change, and holding it open would keep a server out.
        if arguments.once or arguments.json or not isinstance(reader, ServerReader) or not is_live(sys.stdout):
            return _once(reader, name, arguments.json)
        return _live(reader, name, arguments.interval)
    finally:
        reader.close()


def _once(reader: RunReader, name: str, as_json: bool) -> int:
    reply, diagnosis = reader.now(name), reader.diagnosis(name)
    if as_json:
        print(json.dumps({**reply, "diagnosis": diagnosis}, ensure_ascii=False))
        return DONE
    colour = wants_colour(sys.stdout)
    width = size()[0] if sys.stdout.isatty() else None
    for line in view(reply, diagnosis, width=width):
        print(paint(line, colour, width))
    return DONE


class _Verdict:
    """The newest verdict on a run, asked for in a thread: it may take longer than a picture may wait."""

    def __init__(self, reader: RunReader, name: str) -> None:
        self.newest: dict[str, Any] | None = None
        self._reader, self._name = reader, name
        self._due = 0.0
        self._thread: threading.Thread | None = None

    def look(self) -> dict[str, Any] | None:
        """The newest verdict; asks for a newer one if it is time."""
        if time.monotonic() >= self._due and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._ask, daemon=True)
            self._thread.start()
        return self.newest

    def _ask(self) -> None:
        began = time.monotonic()
        # When it fails the old verdict stays: the picture itself says that the server does not answer.
        with contextlib.suppress(CommandError):
            self.newest = self._reader.diagnosis(self._name)
        self._due = time.monotonic() + max(VERDICT_EVERY_S, VERDICT_SHARE * (time.monotonic() - began))


def _live(reader: RunReader, name: str, interval_s: float) -> int:
    verdict = _Verdict(reader, name)
    reply = reader.now(name)
    scroll, note = 0, ""
    # Started by a shell in the background, Python would not listen to Ctrl-C even once it is in front.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Screen(sys.stdout) as screen:
        try:
            while True:
                screen.draw(_picture(reply, verdict.look(), scroll, note))
                for key in screen.keys(interval_s):
                    if key == "quit":
                        return DONE
                    scroll = _scrolled(reply, verdict.newest, scroll, key)
                    screen.draw(_picture(reply, verdict.newest, scroll, note))
                try:
                    reply, note = reader.now(name), ""
                except CommandError as error:
                    note = f"{error}; trying again"
        except KeyboardInterrupt:
            return DONE


def _picture(reply: dict[str, Any], diagnosis: dict[str, Any] | None, scroll: int, note: str) -> list[Line]:
    width, height = size()
    note = f"{note} · q quits" if note else "q quits"
    return view(reply, diagnosis, width=width, height=height, scroll=scroll, note=note)


def _scrolled(reply: dict[str, Any], diagnosis: dict[str, Any] | None, scroll: int, key: str) -> int:
    width, height = size()
    page = max(1, height // 2)
    by = {"up": -1, "down": 1, "page up": -page, "page down": page}.get(key, 0)
    return min(max(scroll + by, 0), hidden_ranks(reply, diagnosis, width, height))
