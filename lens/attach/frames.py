"""The Python stacks of another process, read from its memory: nothing runs in it, and it need not run itself.

A rank that is parked in a collective, in a driver or behind a lock is read like any other. A thread that runs while it
is read changes its stack under the reader: it is read again until two readings agree, and if they never do it is
stopped for the millisecond that one takes, where that is possible.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lens.attach import inject
from lens.attach.layouts import BYTES, INTERPRETER, LAYOUTS, LENGTH, NEXT_THREAD, STATE, TYPE, Layout
from lens.attach.line_tables import line_of
from lens.attach.ptrace import StoppedThread, TraceError

SYMBOLS = ("_PyRuntime", "PyCode_Type")
_FRAME_BYTES = 104
_DEEPEST, _MOST_THREADS = 2_000, 4_096
_LONGEST = 1 << 20
"""Bytes of the longest text or table that is believed."""
_READINGS = 20
_STOP_PATIENCE_S = 1.0
_WORD = struct.Struct("<Q")
_SHIM = "<shim>"
"""The file of an entry by which 3.12 marks that C code called the interpreter."""
_CHARACTERS = {1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}


class UnreadableError(Exception):
    """The memory of a process cannot be read, or holds something else than was expected."""


@dataclass(frozen=True)
class Frame:
    """Where one function of a stack is. line: None where the instruction belongs to none."""

    file: str
    line: int | None
    name: str


@dataclass(frozen=True)
class ThreadStack:
    """One thread. native: its number in the kernel, None where it is not known. frames: the innermost first."""

    native: int | None
    main: bool
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class _Raw:
    """A frame as it stands in memory."""

    code: int
    instruction: int


class _Memory:
    """The memory of a process, read only."""

    def __init__(self, pid: int) -> None:
        try:
            self._file = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnreadableError(f"its memory cannot be opened ({error.strerror})") from error

    def __enter__(self) -> _Memory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def bytes(self, address: int, count: int) -> bytes:
        if not 0 < address < 1 << 63 or not 0 <= count <= _LONGEST:
            raise UnreadableError("a pointer of it leads nowhere")
        try:
            found = os.pread(self._file, count, address)
        except OSError as error:
            raise UnreadableError(f"its memory cannot be read at {address:#x} ({error.strerror})") from error
        if len(found) != count:
            raise UnreadableError(f"its memory ends at {address:#x}")
        return found

    def word(self, address: int) -> int:
        return int(_WORD.unpack(self.bytes(address, 8))[0])


def read(pid: int, version: tuple[int, int], stop: bool = True) -> list[ThreadStack]:
    """The stacks of all threads that run Python, the main thread first.

    stop: whether a thread whose stack never stays the same may be stopped for the millisecond that one reading takes.

    Raises:
        UnreadableError: see there; the message is the reason.
    """
    layout = LAYOUTS.get(version)
    if layout is None:
        raise UnreadableError(f"it is not known how Python {version[0]}.{version[1]} lays out its stacks")
    try:
        places = inject.find(pid, SYMBOLS)
    except (LookupError, OSError) as error:
        raise UnreadableError(str(error)) from error
    with _Memory(pid) as memory:
        reader = _Reader(pid, version, layout, memory, places, stop)
        found = [reader.stack(state) for state in reader.threads()]
    if not found:
        raise UnreadableError("none of its threads runs Python")
    return sorted(found, key=lambda stack: not stack.main)


class _Reader:
    """Walks the structures of one interpreter."""

    def __init__(
        self,
        pid: int,
        version: tuple[int, int],
        layout: Layout,
        memory: _Memory,
        places: dict[str, int],
        stop: bool,
    ) -> None:
        self._stop = stop
        self._pid = pid
        self._version = version
        self._layout = layout
        self._memory = memory
        self._runtime = places["_PyRuntime"]
        self._code_type = places["PyCode_Type"]
        self._main = memory.word(self._runtime + layout.main_thread)
        self._numbers = _numbers(pid)
        self._code = functools.cache(self._code_uncached)

    def threads(self) -> list[int]:
        """Addresses of the thread states of the first interpreter."""
        memory = self._memory
        found: list[int] = []
        interpreter = memory.word(self._runtime + self._layout.interpreters)
        while len(found) < _MOST_THREADS:
            state = memory.word(found[-1] + NEXT_THREAD if found else interpreter + self._layout.threads)
            if not state:
                return found
            if memory.word(state + INTERPRETER) != interpreter:
                raise UnreadableError("its threads are not where this version of Python keeps them")
            found.append(state)
        return found

    def stack(self, state: int) -> ThreadStack:
        """One thread, by its state."""
        layout, memory = self._layout, self._memory
        main = memory.word(state + layout.pthread) == self._main
        native = memory.word(state + layout.native) if layout.native is not None else None
        native = self._pid if main else self._numbers.get(native)
        with contextlib.ExitStack() as until_read:
            raw = self._settled(state)
            if raw is None and native is not None and self._stop:
                try:
                    until_read.enter_context(StoppedThread(native, _STOP_PATIENCE_S))
                    raw = tuple(self._walk(state))
                except TraceError:
                    raw = None
            if raw is None:
                raise UnreadableError("its stack changes faster than it can be read, and it could not be stopped")
            return ThreadStack(native, main, tuple(one for one in map(self._frame, raw) if one.file != _SHIM))

    def _settled(self, state: int) -> tuple[_Raw, ...] | None:
        """Frames that two readings agree about; None if it changes all the time."""
        before: tuple[_Raw, ...] | None = None
        for _ in range(_READINGS):
            try:
                now = tuple(self._walk(state))
            except UnreadableError:
                now = None  # a frame went away under us
            if now is not None and now == before:
                return now
            before = now
        return None

    def _walk(self, state: int) -> Iterator[_Raw]:
        layout, memory = self._layout, self._memory
        frame = state
        for offset in layout.frame:
            frame = memory.word(frame + offset)
        for _ in range(_DEEPEST):
            if not frame:
                return
            # At once: a thread that runs changes them one after the other.
            content = memory.bytes(frame, _FRAME_BYTES)
            code, previous, instruction = (
                int(_WORD.unpack_from(content, offset)[0])
                for offset in (layout.code, layout.previous, layout.instruction)
            )
            # Between two Python functions that C code connects lies an entry without code.
            if code and memory.word(code + TYPE) == self._code_type:
                yield _Raw(code, instruction)
            frame = previous

    def _frame(self, raw: _Raw) -> Frame:
        first = self._layout.first_instruction
        if first is None:
            # An int, of which four bytes count: the instruction's number.
            offset = 2 * struct.unpack("<i", _WORD.pack(raw.instruction)[:4])[0]
        else:
            offset = raw.instruction - raw.code - first
        file, name, first_line, lines = self._code(raw.code)
        return Frame(file, line_of(self._version, lines, first_line, offset), name)

    def _code_uncached(self, code: int) -> tuple[str, str, int, bytes]:
        layout, memory = self._layout, self._memory
        table = memory.word(code + layout.lines)
        (first_line,) = struct.unpack("<i", memory.bytes(code + layout.first_line, 4))
        return (
            self._text(memory.word(code + layout.file)),
            self._text(memory.word(code + layout.name)),
            first_line,
            memory.bytes(table + BYTES, memory.word(table + LENGTH)),
        )

    def _text(self, address: int) -> str:
        memory = self._memory
        state = int.from_bytes(memory.bytes(address + STATE, 4), "little")
        kind, compact, is_ascii = state >> 2 & 7, state >> 5 & 1, state >> 6 & 1
        if not compact or kind not in _CHARACTERS:
            raise UnreadableError("a name in it is not kept as this version of Python keeps names")
        begin = address + (self._layout.ascii if is_ascii else self._layout.wide)
        return memory.bytes(begin, kind * memory.word(address + LENGTH)).decode(_CHARACTERS[kind], "replace")


def _numbers(pid: int) -> dict[int | None, int]:
    """Our number of each thread by the number it has in its own namespace."""
    found: dict[int | None, int] = {}
    for folder in Path(f"/proc/{pid}/task").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            own = re.search(r"^NSpid:.*?(\d+)$", (folder / "status").read_text(), re.MULTILINE)
            found[int(own[1]) if own else int(folder.name)] = int(folder.name)
    return found
