"""A way into this process that it opens itself: a unix socket, for its own user alone, without tracing.

Only where somebody asks for it (``lens.attachable()``, LENS_ATTACH=1): it takes a thread, which sleeps until somebody
connects. Who connects sends one line of JSON, ``{"ask": "attach", "settings": {...}, "attacher": "..."}`` or
``{"ask": "stacks"}``, and is answered by lines of JSON, the last of which is final.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lens.hooks import entering
from lens.ring_files import door_place, private_directory
from lens.settings import Settings

LONGEST_LINE = 65_536
_PATIENCE_S = 30.0
"""Longest wait for the line of somebody who has connected."""
_CREDENTIALS = struct.Struct("3i")

_open: Door | None = None


def open_door(settings: Settings) -> None:
    """Open it, once; forbidden by LENS_ATTACH=0.

    Raises:
        RecorderError, OSError: the socket cannot be made.
    """
    global _open
    if _open is None and os.environ.get("LENS_ATTACH") != "0":
        _open = Door(door_place(settings, os.getpid()))


class Door:
    """The socket and the thread that answers it."""

    def __init__(self, path: Path) -> None:
        private_directory(path.parent)
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._socket.bind(str(path))
        path.chmod(0o600)  # nobody else came before: its directory is private
        self._socket.listen(4)
        self._owner = os.getpid()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._serve, name="lens-door", daemon=True).start()

    def close(self) -> None:
        """Nobody can come in any more."""
        if os.getpid() == self._owner:
            with contextlib.suppress(OSError):
                self._path.unlink()
        with contextlib.suppress(OSError):
            self._socket.close()

    def _forget(self) -> None:
        """In a forked child: the door is its parent's."""
        global _open
        _open = None
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                guest, _ = self._socket.accept()
            except OSError:
                return
            try:
                if _uid(guest) in (os.geteuid(), 0):
                    guest.settimeout(_PATIENCE_S)
                    _answer(guest)
                else:
                    guest.close()
            except Exception:
                guest.close()  # whoever it was: the training goes on


def _uid(guest: socket.socket) -> int:
    """The user at the other end, as the kernel knows it."""
    raw = guest.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def _answer(guest: socket.socket) -> None:
    line = b""
    while not line.endswith(b"\n"):
        part = guest.recv(LONGEST_LINE)
        line += part
        if not part or len(line) > LONGEST_LINE:
            guest.close()
            return
    asked = json.loads(line)
    answer = _ANSWERS.get(asked.get("ask"))
    if answer is None:
        _Guest(guest)("failed", f"it does not know how to {asked.get('ask')}")
    else:
        answer(asked, _Guest(guest))


class _Guest:
    """Somebody who waits for answers; one who has gone does no harm."""

    def __init__(self, guest: socket.socket) -> None:
        self._guest = guest

    def never_wait(self) -> None:
        """From here on it may be told by the thread that trains."""
        self._guest.settimeout(0.0)

    def __call__(self, state: str, text: str, **more: Any) -> None:
        with contextlib.suppress(OSError):
            self._guest.sendall(json.dumps({"state": state, "text": text, **more}).encode() + b"\n")
            if state != "waiting":
                self._guest.shutdown(socket.SHUT_RDWR)
                self._guest.close()


def _attach(asked: Mapping[str, Any], guest: _Guest) -> None:
    guest.never_wait()
    entering.begin(asked["settings"], str(asked["attacher"]), guest)


def _stacks(_: Mapping[str, Any], guest: _Guest) -> None:
    natives = {thread.ident: thread.native_id for thread in threading.enumerate()}
    own, main = threading.get_ident(), threading.main_thread().ident
    found = [
        (natives.get(thread), thread == main, list(_walk(frame)))
        for thread, frame in sys._current_frames().items()
        if thread != own
    ]
    guest("told", "", threads=found)


def _walk(frame: Any) -> Any:
    while frame is not None:
        code = frame.f_code
        yield code.co_filename, frame.f_lineno, getattr(code, "co_qualname", code.co_name)
        frame = frame.f_back


_ANSWERS: Mapping[str | None, Callable[[Mapping[str, Any], _Guest], None]] = {"attach": _attach, "stacks": _stacks}
