"""The terminal as a picture that is drawn again and again in place, and the keys pressed meanwhile."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TextIO

Span = tuple[str, str]
"""A piece of text and the name of its style."""
Line = Sequence[Span]

STYLES = {"": "", "bold": "1", "dim": "2", "good": "32", "warn": "33", "bad": "1;31", "head": "4"}
ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
"""Another page, no cursor, no wrapping of long lines: the page before comes back unharmed."""
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
KEYS = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[5~": "page up", "\x1b[6~": "page down", "k": "up", "j": "down",
        "\x03": "quit", "q": "quit", "Q": "quit"}  # fmt: skip


def wants_colour(stream: TextIO, environ: Mapping[str, str] | None = None) -> bool:
    """Whether to colour: only a terminal, and not where NO_COLOR (https://no-color.org) or a dumb one forbids."""
    environ = os.environ if environ is None else environ
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def is_live(stream: TextIO) -> bool:
    """Whether a picture can be drawn in place: input and output are a terminal that can move its cursor."""
    return stream.isatty() and sys.stdin.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def size() -> tuple[int, int]:
    """Columns and lines."""
    found = shutil.get_terminal_size((160, 40))
    return found.columns, found.lines


def paint(line: Line, colour: bool, width: int | None = None) -> str:
    """The line as text, cut to `width` characters, with its styles if `colour`."""
    left = width if width is not None else sum(len(text) for text, _ in line)
    parts = []
    for text, style in line:
        text, left = text[:left], left - len(text[:left])
        parts.append(f"\x1b[{STYLES[style]}m{text}\x1b[0m" if colour and STYLES[style] and text else text)
    return "".join(parts).rstrip() if not colour else "".join(parts)


class Screen:
    """A page of its own on the terminal while entered; `keys` waits and tells what was pressed.

    However it is left, the page before, the cursor and the keyboard's mode come back: on Ctrl-C, SIGTERM, Ctrl-Z too.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colour = wants_colour(stream)
        self._mode: list[Any] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Screen:
        self._mode = termios.tcgetattr(sys.stdin)
        self._handlers = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, _end),
            signal.SIGTSTP: signal.signal(signal.SIGTSTP, self._pause),
        }
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def draw(self, lines: Sequence[Line]) -> None:
        """Show these lines instead of those before, without a flicker."""
        columns, rows = size()
        painted = [paint(line, self._colour, columns) for line in lines[:rows]]
        self._write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in painted[:-1]))
        self._write((painted[-1] if painted else "") + "\x1b[K\x1b[J")

    def keys(self, seconds: float) -> Iterator[str]:
        """The names of keys pressed within this time, as they are pressed; unknown keys are passed over."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([sys.stdin], [], [], left)[0]:
                typed = os.read(sys.stdin.fileno(), 64).decode(errors="replace")
                if not typed:
                    yield "quit"
                    return
                for sequence in (typed,) if typed.startswith("\x1b") else typed:
                    if sequence in KEYS:
                        yield KEYS[sequence]

    def _open(self) -> None:
        tty.setcbreak(sys.stdin)
        self._write(ENTER)

    def _close(self) -> None:
        # The terminal may be gone (a closed window): then there is nothing left to put back.
        with contextlib.suppress(OSError, termios.error):
            self._write(LEAVE)
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._mode or [])

    def _pause(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: give the terminal back as it was, stop, and take it again when continued."""
        self._close()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._open()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
