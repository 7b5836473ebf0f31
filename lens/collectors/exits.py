"""How a process ended, seen by somebody who is not its parent.

A pidfd says when. The exit status is read from the zombie's /proc/PID/stat, or from the pidfd itself once the
parent has reaped it (Linux 6.15 and later). Where neither can be read it is unknown, and says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

from lens.ring_files import start_ticks

_INFO = struct.Struct("<QQ11Ii")
_PIDFD_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT = 1 << 3


@dataclass(frozen=True)
class ExitStatus:
    """An exit code, negative of the signal when a signal ended the process; None when it is unknown."""

    exit_code: int | None
    signal: int | None = None

    @classmethod
    def of_wait_status(cls, status: int) -> ExitStatus:
        """From the number that ``wait`` gives."""
        ended_by = status & 0x7F
        return cls(-ended_by, ended_by) if ended_by else cls(status >> 8 & 0xFF)

    @property
    def text(self) -> str:
        """In words."""
        if self.signal is not None:
            with contextlib.suppress(ValueError):
                return f"ended by {signal.Signals(self.signal).name}"
            return f"ended by signal {self.signal}"
        return "ended, exit code unknown" if self.exit_code is None else f"ended with exit code {self.exit_code}"


class ProcessWatch:
    """Watches one process; safe against its pid being given to another.

    Args:
        pid: process id.
        ticks: its start time, in clock ticks since boot.
    """

    def __init__(self, pid: int, ticks: int) -> None:
        self.pid = pid
        self._ticks = ticks
        self.descriptor = -1
        with contextlib.suppress(OSError, AttributeError):
            self.descriptor = os.pidfd_open(pid)
        # Looked at after the pidfd was opened: only then is it the same process for good.
        if not self._same_process():
            self.close()

    def alive(self) -> bool:
        """Whether the process still runs; a zombie does not."""
        if self.descriptor >= 0:
            poller = select.poll()
            poller.register(self.descriptor, select.POLLIN)
            return not poller.poll(0)
        return self._same_process() and self.state() not in ("Z", "X", None)

    def state(self) -> str | None:
        """The letter of the kernel's process state, such as R, S, T or Z; None when it is gone."""
        fields = self._stat()
        return fields[0] if fields else None

    def status(self) -> ExitStatus:
        """How it ended."""
        fields = self._stat()
        if fields and fields[0] == "Z" and self._may_read() and self._same_process():
            return ExitStatus.of_wait_status(int(fields[49]))
        if self.descriptor >= 0:
            question = bytearray(_INFO.pack(_PIDFD_INFO_EXIT, 0, *(0,) * 12))
            with contextlib.suppress(OSError):
                fcntl.ioctl(self.descriptor, _PIDFD_GET_INFO, question)
                answer = _INFO.unpack(question)
                if answer[0] & _PIDFD_INFO_EXIT:
                    return ExitStatus.of_wait_status(answer[-1])
        return ExitStatus(None)

    def close(self) -> None:
        """Let go of the process."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def _stat(self) -> list[str]:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            return []

    def _same_process(self) -> bool:
        try:
            return start_ticks(self.pid) == self._ticks
        except (OSError, ValueError, IndexError):
            return False

    def _may_read(self) -> bool:
        """The kernel shows 0 as exit code to users who may not see it."""
        with contextlib.suppress(OSError):
            return os.geteuid() in (0, Path(f"/proc/{self.pid}").stat().st_uid)
        return False
