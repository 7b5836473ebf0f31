"""The recorder: a memory-mapped ring of slots that a producing thread writes and the agent reads.

No lock, no thread, no system call on the way: a record is one ``struct.pack_into``. Whatever was written before a
``kill -9`` is in the file. See `lens.slots` for the slot itself.

A ring file is: header page · control page · string table · slots. Header words (int64):

| word | holds |
|---|---|
| 0 … 5 | magic · version · slot count · offset of the strings · their capacity · offset of the slots |
| 6 … 8 | pid · thread id · closed (1 after a clean end) |
| 9, 10 | string bytes used · strings refused because the table was full |
| 16 … 21 | the collective entered last: t0 (0 once left) · op and group ids · seq · bytes · step · t1 |
| 24 … 27 | the phase entered last: t0 (0 once left) · name id · step · t1 |
| 32 … 34 | the step entered last: t0 (0 once left) · number · t1 |

Only the standard library is used: training processes load this.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lens.settings import Settings
from lens.slots import (
    COLLECTIVE,
    EVENT,
    NULL,
    OWN_RANK,
    PHASE,
    ROW,
    SLOT_BYTES,
    SPAN,
    STEP,
    VECTOR,
    continuations,
)

MAGIC = int.from_bytes(b"LENSRNG1", "little")
VERSION = 1
PAGE = 4096
STRING_BYTES = 256 * 1024
SLOT_COUNT_WORD, STRINGS_AT_WORD, STRINGS_SIZE_WORD, SLOTS_AT_WORD = 2, 3, 4, 5
PID_WORD, THREAD_WORD, CLOSED_WORD, STRINGS_USED_WORD, STRINGS_REFUSED_WORD = 6, 7, 8, 9, 10
OPEN_COLLECTIVE_WORD, OPEN_PHASE_WORD, OPEN_STEP_WORD = 16, 24, 32
CONTROL_WORDS = ("detach", "detail", "profile_step", "profile_steps", "backoff_pct", "agent_seen_ns")

_WORD = struct.Struct("<q")
_SLOT = struct.Struct("<16q")
_WIDE = struct.Struct("<7q8dq")
_MORE = struct.Struct("<q14dq")
_OPEN_COLLECTIVE = struct.Struct("<5q")
_OPEN_PAIR = struct.Struct("<3q")
_HEADER = struct.Struct("<9q")
_CONTROL = struct.Struct(f"<{len(CONTROL_WORDS)}q")
_SEVERITY_WORD = {"info": 0, "warning": 1, "error": 2}


class RecorderError(RuntimeError):
    """The recorder cannot record here; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Control:
    """What the agent or the CLI asks of the hook, read once a step."""

    detach: int = 0
    detail: int = 0
    profile_step: int = 0
    profile_steps: int = 0
    backoff_pct: int = 0
    agent_seen_ns: int = 0


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot: with the pid it names a process for good.

    Raises:
        OSError: no such process.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rsplit(")", 1)[1].split()[19])


def private_directory(path: Path) -> Path:
    """The directory, made if missing, for this user alone.

    Raises:
        RecorderError: it is a link, belongs to somebody else, or others may read it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RecorderError(f"no recorder: {path} cannot be made ({error.strerror}); set LENS_RINGS") from error
    if not path.is_dir() or path.is_symlink():
        raise RecorderError(f"no recorder: {path} is not a plain directory; set LENS_RINGS")
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RecorderError(f"no recorder: {path} is not private to this user; remove it or set LENS_RINGS")
    return path


def host_directory(settings: Settings) -> Path:
    """Where the rings of this host's processes lie."""
    return settings.rings / (settings.host.replace("/", "_") or "host")


class Recorder:
    """Writes one ring. Belongs to one thread; `for_thread` gives another thread its own.

    After a fork the child's recorder writes into memory of its own that nobody reads, so that a DataLoader worker
    can never overwrite its parent's slots.
    """

    _living: ClassVar[weakref.WeakSet[Recorder]] = weakref.WeakSet()

    def __init__(self, path: Path, settings: Settings, about: dict[str, Any]) -> None:
        self.path = path
        self.about = about
        self._settings = settings
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._others: dict[int, Recorder] = {}
        self._strings: dict[str, int] = {"": 0}
        self._strings_used = 0
        self._next = 1
        count = 1 << max(6, (settings.ring_mib * 1024 * 1024 // SLOT_BYTES).bit_length() - 1)
        self._mask = count - 1
        self._slots_at = 2 * PAGE + STRING_BYTES
        self._size = self._slots_at + count * SLOT_BYTES
        self._map = _allocate(path, self._size)
        self._bind()
        words = (
            MAGIC,
            VERSION,
            count,
            2 * PAGE,
            STRING_BYTES,
            self._slots_at,
            self._pid,
            threading.get_native_id(),
        )
        _HEADER.pack_into(self._map, 0, *words, 0)
        Recorder._living.add(self)

    @classmethod
    def create(cls, settings: Settings, about: Mapping[str, Any]) -> Recorder:
        """A recorder for the calling thread of this process.

        Raises:
            RecorderError: no room, no permission, or a directory that is not private.
        """
        pid = os.getpid()
        private_directory(settings.rings)
        private_directory(host_directory(settings))
        directory = private_directory(host_directory(settings) / f"{pid}-{start_ticks(pid)}")
        full = {
            "run": settings.run,
            "name": settings.name,
            "rank": None,
            "world_size": None,
            "host": settings.host,
            "device": settings.device,
            "role": "trainer",
            "server": settings.server,
            **about,
            "pid": pid,
            "start_ticks": start_ticks(pid),
        }
        recorder = cls(_free_name(directory, "main"), settings, full)
        recorder.describe()
        return recorder

    def for_thread(self) -> Recorder:
        """The calling thread's own recorder: this one, or one made for it on its first record."""
        thread = threading.get_ident()
        if thread == self._thread:
            return self
        other = self._others.get(thread)
        if other is None:
            name = f"thread-{threading.get_native_id()}"
            other = Recorder(_free_name(self.path.parent, name), self._settings, self.about)
            self._others[thread] = other
        return other

    def describe(self, **changes: Any) -> None:
        """Rewrite ``about.json``, from which the agent registers the run: atomic, so it is never seen half."""
        self.about.update(changes)
        target = self.path.parent / "about.json"
        partial = target.with_suffix(".new")
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(self.about, file)
            partial.replace(target)
        except OSError as error:
            raise RecorderError(f"no recorder: {target} cannot be written ({error.strerror})") from error

    def intern(self, text: str) -> int:
        """The id of a string in this ring's table; 0 when the table is full (counted in the header)."""
        found = self._strings.get(text)
        if found is not None:
            return found
        data = text.encode("utf-8", "replace")
        if self._strings_used + 4 + len(data) > STRING_BYTES:
            refused = _WORD.unpack_from(self._map, STRINGS_REFUSED_WORD * 8)[0]
            _WORD.pack_into(self._map, STRINGS_REFUSED_WORD * 8, refused + 1)
            return 0
        at = 2 * PAGE + self._strings_used
        self._map[at : at + 4 + len(data)] = len(data).to_bytes(4, "little") + data
        self._strings_used += 4 + len(data)
        number = len(self._strings)
        self._strings[text] = number
        # Written last: a reader that sees the new size sees the text too.
        _WORD.pack_into(self._map, STRINGS_USED_WORD * 8, self._strings_used)
        return number

    def _bind(self) -> None:
        """Header writers that cost no Python frame: a hook calls them around every collective and phase.

        note_collective(t0, ids, seq, size, step), note_phase(t0, name id, step).
        """
        self.note_collective = partial(_OPEN_COLLECTIVE.pack_into, self._map, OPEN_COLLECTIVE_WORD * 8)
        self.note_phase = partial(_OPEN_PAIR.pack_into, self._map, OPEN_PHASE_WORD * 8)

    def enter_step(self, step: int, t0: int) -> None:
        """Note in the header that a step has begun: what a killed rank was in can be read afterwards."""
        _OPEN_PAIR.pack_into(self._map, OPEN_STEP_WORD * 8, t0, step, 0)

    def step(
        self,
        step: int,
        t0: int,
        t1: int,
        tokens: int = NULL,
        micro_batches: int = NULL,
        seq_sq: int = NULL,
        recompiles: int = NULL,
        gc_ns: int = NULL,
        log_ns: int = NULL,
        overhead_ns: int = NULL,
    ) -> None:
        """Record one step of this rank; times CLOCK_MONOTONIC ns."""
        seq = self._next
        self._next = seq + 1
        _SLOT.pack_into(
            self._map, self._slots_at + ((seq - 1 & self._mask) << 7),
            seq, STEP, t0, t1, step, 0, tokens, micro_batches, seq_sq, recompiles, gc_ns, log_ns, overhead_ns,
            0, 0, seq,
        )  # fmt: skip
        _OPEN_PAIR.pack_into(self._map, OPEN_STEP_WORD * 8, 0, step, t1)

    def enter_phase(self, name_id: int, t0: int, step: int) -> None:
        """Note in the header that a phase has begun."""
        _OPEN_PAIR.pack_into(self._map, OPEN_PHASE_WORD * 8, t0, name_id, step)

    def phase(self, name_id: int, t0: int, t1: int, step: int, micro_batch: int = NULL) -> None:
        """Record one phase of a step; times CLOCK_MONOTONIC ns."""
        seq = self._next
        self._next = seq + 1
        _SLOT.pack_into(
            self._map, self._slots_at + ((seq - 1 & self._mask) << 7),
            seq, PHASE, t0, t1, step, name_id, micro_batch, 0, 0, 0, 0, 0, 0, 0, 0, seq,
        )  # fmt: skip
        _WORD.pack_into(self._map, OPEN_PHASE_WORD * 8, 0)

    def leave_phase(self) -> None:
        """Note in the header that the phase was left without recording it: whose it is will be known later."""
        _WORD.pack_into(self._map, OPEN_PHASE_WORD * 8, 0)

    def enter_collective(self, ids: int, t0: int, seq: int, size: int, step: int) -> None:
        """Note in the header that a collective was entered; ids = op id | group id << 32, size in bytes."""
        _OPEN_COLLECTIVE.pack_into(self._map, OPEN_COLLECTIVE_WORD * 8, t0, ids, seq, size, step)

    def collective(
        self,
        ids: int,
        t0: int,
        t1: int,
        step: int,
        number: int,
        size: int,
        t_wait: int = NULL,
        t_done: int = NULL,
        dtype_phase: int = 0,
        layer_micro_batch: int = 0,
        peer_flags: int = 0,
    ) -> None:
        """Record one collective: ids = op | group << 32, number = the group's own sequence, size in bytes."""
        seq = self._next
        self._next = seq + 1
        _SLOT.pack_into(
            self._map, self._slots_at + ((seq - 1 & self._mask) << 7),
            seq, COLLECTIVE, t0, t1, step, ids, number, size, t_wait, t_done, dtype_phase, layer_micro_batch,
            peer_flags, 0, 0, seq,
        )  # fmt: skip
        _WORD.pack_into(self._map, OPEN_COLLECTIVE_WORD * 8, 0)

    def row(
        self,
        columns_id: int,
        values: Sequence[float],
        t: int,
        step: int = NULL,
        device_id: int = 0,
        rank: int = OWN_RANK,
    ) -> None:
        """Record one value a column: `columns_id` is the interned list of series keys, `rank` a rank field."""
        self._numbers(ROW, rank, t, step, columns_id | device_id << 32, len(values), values)

    def vector(
        self,
        metric_id: int,
        values: Sequence[float],
        t: int,
        step: int = NULL,
        layer: int | None = None,
        labels_id: int = 0,
        rank: int = OWN_RANK,
    ) -> None:
        """Record one vector, such as the tokens of each expert of a layer."""
        layer_word = 0 if layer is None else layer + 1
        self._numbers(VECTOR, rank, t, step, metric_id | labels_id << 32, len(values) | layer_word << 32, values)

    def event(
        self,
        kind: str,
        text: str,
        severity: str = "info",
        t: int | None = None,
        step: int = NULL,
        attrs: Mapping[str, Any] | None = None,
        device: str | None = None,
        rank: int = OWN_RANK,
    ) -> None:
        """Record an event; `rank` is a rank field (`lens.slots.rank_field`): the agent speaks of other ranks."""
        body: dict[str, Any] = {"text": text}
        if attrs:
            body["attrs"] = dict(attrs)
        ids = self.intern(kind) | (self.intern(device) << 32 if device else 0)
        t = time.monotonic_ns() if t is None else t
        self._text(EVENT, rank, t, _SEVERITY_WORD[severity], step, ids, body)

    def span(
        self, kind: str, name: str, t0: int, t1: int, step: int = NULL, attrs: Mapping[str, Any] | None = None
    ) -> None:
        """Record a span that is neither step, phase nor collective: a checkpoint, a request."""
        ids = self.intern(name) | self.intern(kind) << 32
        self._text(SPAN, OWN_RANK, t0, t1, step, ids, dict(attrs) if attrs else {})

    def control(self) -> Control:
        """What the control page says now."""
        return Control(*_CONTROL.unpack_from(self._map, PAGE))

    def detach_asked(self) -> bool:
        """Whether the control page asks the hook to leave: what is read once a step."""
        return bool(_WORD.unpack_from(self._map, PAGE)[0])

    def close(self, clean: bool = True) -> None:
        """Mark the ring as closed; the file stays for the agent, which removes it once it has everything."""
        for other in self._others.values():
            other.close(clean)
        if os.getpid() == self._pid:
            _WORD.pack_into(self._map, CLOSED_WORD * 8, 1 if clean else 0)
        Recorder._living.discard(self)

    def _numbers(
        self, kind: int, rank: int, t: int, step: int, ids: int, count_word: int, values: Sequence[float]
    ) -> None:
        more = continuations(len(values))
        seq = self._next
        self._next = seq + 1 + more
        at = self._slots_at + ((seq - 1 & self._mask) << 7)
        first = values if len(values) == 8 else (*values[:8], *(0.0,) * (8 - len(values[:8])))
        _WIDE.pack_into(
            self._map, at, seq, kind | more << 8 | rank << 32, t, NULL, step, ids, count_word, *first, seq
        )
        for index in range(more):
            seq += 1
            part = values[8 + 14 * index : 22 + 14 * index]
            padding = (0.0,) * (14 - len(part))
            at = self._slots_at + ((seq - 1 & self._mask) << 7)
            _MORE.pack_into(self._map, at, seq, *part, *padding, -seq)

    def _text(self, kind: int, rank: int, t0: int, t1: int, step: int, ids: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body, separators=(",", ":"), default=str).encode() if body else b""
        # One record may take at most a quarter of the ring, or it would overwrite its own beginning.
        payload = payload if len(payload) <= (self._mask + 1) * 28 else b"{}"
        more = continuations(-(-len(payload) // 8))
        padded = payload.ljust(64 + more * 112, b"\0")
        seq = self._next
        self._next = seq + 1 + more
        at = self._slots_at + ((seq - 1 & self._mask) << 7)
        words = struct.unpack_from("<8q", padded)
        head = (seq, kind | more << 8 | rank << 32, t0, t1, step, ids, len(payload))
        _SLOT.pack_into(self._map, at, *head, *words, seq)
        for index in range(more):
            seq += 1
            at = self._slots_at + ((seq - 1 & self._mask) << 7)
            words = struct.unpack_from("<14q", padded, 64 + 112 * index)
            _SLOT.pack_into(self._map, at, seq, *words, -seq)

    def _leave_parent(self) -> None:
        # Anonymous memory is only backed when touched: this costs the child nothing until it records.
        self._map = mmap.mmap(-1, self._size)
        self._bind()
        self._others = {}


def _allocate(path: Path, size: int) -> mmap.mmap:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RecorderError(f"no recorder: {path} cannot be made ({error.strerror}); set LENS_RINGS") from error
    try:
        # Reserved before it is mapped: writing to a hole on a full disk would kill the process with SIGBUS.
        os.posix_fallocate(descriptor, 0, size)
        # Populated: the first touch of a page would otherwise cost the training a fault.
        return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise RecorderError(
            f"no recorder: {size >> 20} MiB cannot be had in {path.parent} ({error.strerror}); "
            "set LENS_RINGS to a local disk with room, or LENS_RING_MIB smaller"
        ) from error
    finally:
        os.close(descriptor)


def _free_name(directory: Path, stem: str) -> Path:
    path, number = directory / f"{stem}.ring", 1
    while path.exists():
        number += 1
        path = directory / f"{stem}-{number}.ring"
    return path


def _after_fork_in_child() -> None:
    for recorder in list(Recorder._living):
        recorder._leave_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
