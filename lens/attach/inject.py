"""Let a running CPython run a line of Python at a moment that it chooses itself.

The main thread is stopped for about a millisecond and made to call ``Py_AddPendingCall(PyRun_SimpleString, line)``,
which only writes two words into a queue; then it is put back as it was. The interpreter takes the call from the queue
at its next bytecode boundary, with its lock held. Nothing is allocated, loaded or run while the thread is stopped, no
other thread is stopped, and no library is put into the target.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lens.attach import elf
from lens.attach import x86_64 as machine
from lens.attach.ptrace import StoppedThread, TraceError

PATIENCE_S = 1.0
FUNCTIONS = ("Py_AddPendingCall", "PyRun_SimpleString")
LINE_BYTES = 8_000
_PAGE_BYTES = 8_192
_LINE_AT = 16
_READ_WRITE, _PRIVATE_ANONYMOUS = 3, 0x22
_WORD = struct.Struct("<Q")
_SYMBOLS: dict[tuple[object, ...], Mapping[str, int]] = {}
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Addresses:
    """Where things lie in the target."""

    add_pending_call: int
    run_simple_string: int
    syscall: int
    """An instruction that asks the kernel."""


@dataclass(frozen=True)
class Injected:
    """What an injection took. stopped_s: seconds for which the main thread stood still."""

    stopped_s: float


def locate(pid: int) -> Addresses:
    """Find the interpreter's functions in a process.

    Raises:
        LookupError: there is no CPython whose functions can be found.
        OSError: the process cannot be read.
    """
    found = find(pid, FUNCTIONS)
    mapped = _mapped_files(pid)
    for name in mapped:
        if Path(name).name.startswith(("libc.so", "libc-2", "ld-musl")):
            place = elf.read(_file_of(pid, name)).find_code(machine.SYSCALL)
            if place is not None:
                return Addresses(found[FUNCTIONS[0]], found[FUNCTIONS[1]], mapped[name] + place)
    raise LookupError("no C library was found in it")


def find(pid: int, names: Collection[str]) -> dict[str, int]:
    """Addresses of these names of the interpreter in a process.

    Raises:
        LookupError: there is no CPython that shows all of them.
        OSError: the process cannot be read.
    """
    mapped = _mapped_files(pid)
    program = str(Path(f"/proc/{pid}/exe").readlink())
    for name in [name for name in mapped if "libpython" in Path(name).name] + [program]:
        try:
            symbols = _symbols(_file_of(pid, name), names)
        except (OSError, elf.ElfError):
            continue
        if name in mapped and set(names) <= set(symbols):
            return {symbol: mapped[name] + address for symbol, address in symbols.items()}
    raise LookupError(f"no CPython was found in it: neither the program nor a libpython shows {sorted(names)[0]}")


def run_line(pid: int, line: str, addresses: Addresses | None = None, patience_s: float = PATIENCE_S) -> Injected:
    """Queue a line of Python in the main thread of a process. The line must not raise.

    Raises:
        TraceError: the kernel refused, the target ended or did not stop in time; it was left as it was.
        LookupError: see `locate`.
        ValueError: the line is too long.
    """
    code = line.encode() + b"\0"
    if len(code) > LINE_BYTES:
        raise ValueError(f"the line has {len(code)} bytes, {LINE_BYTES} are possible")
    places = addresses or locate(pid)
    began = time.monotonic()
    with _undisturbed(), _ahead_of_others(), StoppedThread(pid, patience_s) as thread:
        vectors = thread.read_set(machine.VECTOR_SET, machine.VECTOR_BYTES)
        integers = thread.read_set(machine.REGISTER_SET, machine.REGISTER_BYTES)
        try:
            queued = _queue(pid, thread, places, code)
        finally:
            thread.write_set(machine.VECTOR_SET, vectors)
            thread.write_set(machine.REGISTER_SET, integers)
    if queued != 0:
        raise TraceError("the interpreter's queue of pending calls is full: it has not run Python code for a while")
    return Injected(time.monotonic() - began)


def wake(pid: int, patience_s: float = PATIENCE_S) -> bool:
    """Let a main thread that waits for a lock (a join, a queue) look up once; whether it was waiting so.

    Raises:
        TraceError: see `run_line`.
    """
    with StoppedThread(pid, patience_s) as thread:
        changed = machine.interrupted_futex(thread.registers())
        if changed is not None:
            thread.set_registers(changed)
    return changed is not None


def _symbols(path: Path, names: Collection[str]) -> Mapping[str, int]:
    """Symbols of a file: the ranks of a host run the same interpreter, which is read once."""
    about = path.stat()
    identity = (about.st_dev, about.st_ino, about.st_mtime_ns, *sorted(names))
    if identity not in _SYMBOLS:
        _SYMBOLS[identity] = elf.read(path, names).symbols
    return _SYMBOLS[identity]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Be told to end afterwards: a target whose registers are ours would crash without us."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _ahead_of_others() -> Iterator[None]:
    """Run before other processes, where that is allowed: on a busy host the target would stand while we wait."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def _queue(pid: int, thread: StoppedThread, places: Addresses, code: bytes) -> int:
    """Map a page, write the line there, and call Py_AddPendingCall on it; what that returned."""
    now = thread.registers()
    no_file = (1 << 64) - 1
    thread.set_registers(
        machine.at_syscall(
            now, places.syscall, machine.MMAP, 0, _PAGE_BYTES, _READ_WRITE, _PRIVATE_ANONYMOUS, no_file, 0
        )
    )
    thread.single_step()
    page = machine.result(thread.registers())
    if -4096 < page < 0:
        raise TraceError(f"the target could not map a page (errno {-page})")
    stack = machine.stack_for_call(now)
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(page + _LINE_AT)
        memory.write(code)
        # The function returns to the page, which is not executable: the fault there is how we know.
        memory.seek(stack)
        memory.write(_WORD.pack(page))
    thread.set_registers(
        machine.at_call(now, places.add_pending_call, stack, places.run_simple_string, page + _LINE_AT)
    )
    while True:
        arrived = thread.run_to_signal()
        state = thread.registers()
        if arrived == signal.SIGSEGV and machine.instruction(state) == page:
            # An int: its upper half means nothing.
            return machine.result(state) & 0xFFFFFFFF
        if arrived in _FAULTS:
            raise TraceError(f"the call faulted (signal {arrived})")
        thread.keep_signal(arrived)


def _file_of(pid: int, name: str) -> Path:
    """A file that a process has mapped, by the name that the kernel shows: below that process's own root."""
    root = Path(f"/proc/{pid}/root")
    return root / name.removeprefix(str(root.readlink())).lstrip("/")


def _mapped_files(pid: int) -> dict[str, int]:
    """Lowest address of each file that a process has mapped."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[5].startswith("/"):
            found.setdefault(fields[5], int(fields[0].split("-")[0], 16))
    return found
