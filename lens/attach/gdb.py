"""The same pending call through gdb, for hosts where gdb may trace and we may not, or whose processor is not ours.

gdb stops every thread, and for longer: some tenths of a second. Nothing is allocated by the target's allocator here
either: the page is asked of the kernel, and gdb writes the line there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from lens.attach.ptrace import TraceError

_PAGE_BYTES = 8_192
PATIENCE_S = 30.0
_QUEUED = re.compile(r"^lens queued: (-?\d+)$", re.MULTILINE)


def program() -> str | None:
    """Where gdb is; None where it is not installed."""
    return shutil.which("gdb")


def run_line(pid: int, line: str) -> float:
    """Queue a line of Python in the main thread of a process; seconds that it stood still at most.

    Raises:
        TraceError: gdb is missing, was refused, or could not do it; the target goes on.
        ValueError: the line is too long.
    """
    found = program()
    if found is None:
        raise TraceError("gdb is not installed")
    code = line.encode() + b"\0"
    if len(code) > _PAGE_BYTES:
        raise ValueError(f"the line has {len(code)} bytes, {_PAGE_BYTES} are possible")
    with tempfile.NamedTemporaryFile(prefix="lens-line-") as file:
        file.write(code)
        file.flush()
        began = time.monotonic()
        try:
            done = subprocess.run(
                command(found, pid, Path(file.name)), capture_output=True, text=True, timeout=PATIENCE_S, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise TraceError(f"gdb has not come back within {PATIENCE_S:g} s") from error
    queued = _QUEUED.search(done.stdout)
    if queued is None:
        raise TraceError(f"gdb could not do it: {_reason(done.stderr or done.stdout)}")
    if int(queued[1]) != 0:
        raise TraceError("the interpreter's queue of pending calls is full: it has not run Python code for a while")
    return time.monotonic() - began


def command(gdb: str, pid: int, line: Path) -> list[str]:
    """The words that make gdb queue the contents of a file. Symbols of torch's libraries would take it seconds."""
    before = ("set auto-solib-add off", "set debuginfod enabled off", "set confirm off")
    then = (
        "set unwindonsignal on",
        "sharedlibrary libpython",
        "sharedlibrary libc[.-]",
        "thread 1",
        "set scheduler-locking on",
        f"set $page = ((char *(*)(void *, unsigned long, int, int, int, long)) mmap)(0, {_PAGE_BYTES}, 3, 34, -1, 0)",
        f"restore {line} binary $page",
        "set $queued = ((int (*)(void *, void *)) Py_AddPendingCall)((void *) PyRun_SimpleString, $page)",
        'printf "lens queued: %d\\n", $queued',
        "detach",
    )
    words = [gdb, "-nx", "-q", "-batch"]
    words += [word for one in before for word in ("-iex", one)]
    return [*words, "-p", str(pid), *(word for one in then for word in ("-ex", one))]


def _reason(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip() and "debuginfod" not in line]
    return next((line for line in lines if "ptrace" in line), lines[-1] if lines else "it said nothing")[:300]
