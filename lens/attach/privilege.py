"""Root at somebody's training: what is written, started and listened on is that person's; only tracing stays root's."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

CAP_SYS_PTRACE = 1 << 19
_PR_SET_KEEPCAPS = 8
_VERSION_3 = 0x20080522
_HEADER, _SETS = struct.Struct("=Ii"), struct.Struct("=IIIIII")


def act_for(pid: int) -> bool:
    """As root become the user of a process, and keep of root's rights the one to trace; whether that was needed.

    What is executed from here on has no right beyond that user's.

    Raises:
        OSError: the process has ended, the kernel refused, or that user cannot read the Python that we run in.
    """
    owner = Path(f"/proc/{pid}").stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0))
    os.setgroups([])
    os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
    os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
    # Twice 32 bits of the effective, permitted and inheritable sets.
    kept = _SETS.pack(CAP_SYS_PTRACE, CAP_SYS_PTRACE, 0, 0, 0, 0)
    _checked(libc.capset(_HEADER.pack(_VERSION_3, 0), kept))
    if not os.access(os.__file__, os.R_OK):
        raise PermissionError(f"user {owner.st_uid} cannot read {sys.prefix}, where this lens runs")
    return True


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
