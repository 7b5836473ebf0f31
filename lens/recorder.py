"""The recorder: a memory-mapped ring of slots that a producing thread writes and the agent reads.

No lock, no thread, no system call on the way. Whatever was written before a ``kill -9`` is in the file. See
`lens.slots` for the slot itself.

A record in the midst of a training step is met with cold caches: what it costs is the code and memory it touches for
the first time since the last one. So short records are written word by word through one `memoryview`, and only the
words that their type has; ``struct`` alone would cost more than all the rest.

A ring file is: header page · control page · string table · slots. Header words (int64):

| word | holds |
|---|---|
| 0 … 5 | magic · version · slot count · offset of the strings · their capacity · offset of the slots |
| 6 … 8 | pid · thread id · closed (1 after a clean end) |
| 9, 10 | string bytes used · strings refused because the table was full |
| 16 … 21 | the collective entered last: t0 (0 once left) · op and group ids · seq · bytes · step · t1 |
| 24 … 27 | the phase entered last: t0 (0 once left) · name id · step · t1 |
| 32 … 34 | the step entered last: t0 (0 once left) · number · t1 |
| 64 … 447 | collectives in flight, written by the native observer alone: 48 times 8 words (below) |

A collective in flight: t0 (0 where none is) · op and group ids · seq · bytes · step · since when it is waited for (0
not) · when it was completed (0 not yet) · 1 if asynchronous.

Only the standard library is used: training processes load this.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lens.ring_files import (
    RecorderError,
    allocate,
    free_name,
    host_directory,
    private_directory,
    start_ticks,
)
from lens.settings import Settings
from lens.slots import (
    COLLECTIVE,
    EVENT,
    FIRST_PAYLOAD_WORDS,
    NEXT_PAYLOAD_WORDS,
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
OPEN_COLLECTIVE_BYTE, OPEN_PHASE_BYTE, OPEN_STEP_BYTE = (
    8 * OPEN_COLLECTIVE_WORD,
    8 * OPEN_PHASE_WORD,
    8 * OPEN_STEP_WORD,
)
CONTROL_WORD = PAGE // 8
FLIGHTS_WORD, FLIGHT_WORDS, FLIGHTS = 64, 8, 48
CONTROL_WORDS = ("detach", "detail", "profile_step", "profile_steps", "backoff_pct", "agent_seen_ns")

_WORD = struct.Struct("<q")
_SLOT = struct.Struct("<16q")
pack_slot = _SLOT.pack_into
"""``pack_slot(recorder.words, byte, *words)``: all words of a slot, in their order, in one call instead of one each."""
pack_three, pack_five = struct.Struct("<3q").pack_into, struct.Struct("<5q").pack_into
"""The same of so many words, as the header says what is open."""
_WIDE, _MORE = "7q8dq", "q14dq"
_FIRST, _NEXT = FIRST_PAYLOAD_WORDS, NEXT_PAYLOAD_WORDS
_HEADER = struct.Struct("<9q")
_CONTROL = struct.Struct(f"<{len(CONTROL_WORDS)}q")
_SEVERITY_WORD = {"info": 0, "warning": 1, "error": 2}


@dataclass(frozen=True)
class Control:
    """What the agent or the CLI asks of the hook, read once a step."""

    detach: int = 0
    detail: int = 0
    profile_step: int = 0
    profile_steps: int = 0
    backoff_pct: int = 0
    agent_seen_ns: int = 0


class Recorder:
    """Writes one ring. Belongs to one thread; `for_thread` gives another thread its own.

    After a fork the child's recorder writes into memory of its own that nobody reads, so that a DataLoader worker
    can never overwrite its parent's slots.
    """

    __slots__ = (
        "__weakref__",
        "_floats",
        "_map",
        "_others",
        "_pid",
        "_settings",
        "_size",
        "_strings",
        "_strings_used",
        "_thread",
        "about",
        "first_byte",
        "first_word",
        "mask",
        "next",
        "path",
        "words",
    )
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
        self.next = 1
        """Sequence of the next slot."""
        count = 1 << max(6, (settings.ring_mib * 1024 * 1024 // SLOT_BYTES).bit_length() - 1)
        self.mask = count - 1
        slots_at = 2 * PAGE + STRING_BYTES
        self.first_word = slots_at // 8
        """Index in `words` of the first slot; the slot of sequence s begins 16 * (s - 1 & mask) words behind it."""
        self.first_byte = slots_at
        """The same in bytes, for `pack_slot`."""
        self._size = slots_at + count * SLOT_BYTES
        self._map = allocate(path, self._size)
        self._view()
        words = (
            MAGIC,
            VERSION,
            count,
            2 * PAGE,
            STRING_BYTES,
            slots_at,
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
        recorder = cls(free_name(directory, "main"), settings, full)
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
            other = Recorder(free_name(self.path.parent, name), self._settings, self.about)
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
            self.words[STRINGS_REFUSED_WORD] += 1
            return 0
        at = 2 * PAGE + self._strings_used
        self._map[at : at + 4 + len(data)] = len(data).to_bytes(4, "little") + data
        self._strings_used += 4 + len(data)
        number = len(self._strings)
        self._strings[text] = number
        # Written last: a reader that sees the new size sees the text too.
        self.words[STRINGS_USED_WORD] = self._strings_used
        return number

    def enter_step(self, step: int, t0: int) -> None:
        """Note in the header that a step has begun: what a killed rank was in can be read afterwards."""
        pack_three(self.words, OPEN_STEP_BYTE, t0, step, 0)

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
        words, seq = self.words, self.next
        pack_slot(
            words, self.first_byte + ((seq - 1 & self.mask) << 7),
            seq, STEP, t0, t1, step, 0, tokens, micro_batches, seq_sq, recompiles, gc_ns, log_ns, overhead_ns, 0, 0, seq,
        )  # fmt: skip
        self.next = seq + 1
        pack_three(words, OPEN_STEP_BYTE, 0, step, t1)

    def enter_phase(self, name_id: int, t0: int, step: int) -> None:
        """Note in the header that a phase has begun."""
        pack_three(self.words, OPEN_PHASE_BYTE, t0, name_id, step)

    def phase(self, name_id: int, t0: int, t1: int, step: int, micro_batch: int = NULL) -> None:
        """Record one phase of a step; times CLOCK_MONOTONIC ns."""
        words, seq = self.words, self.next
        pack_slot(
            words, self.first_byte + ((seq - 1 & self.mask) << 7),
            seq, PHASE, t0, t1, step, name_id, micro_batch, 0, 0, 0, 0, 0, 0, 0, 0, seq,
        )  # fmt: skip
        self.next = seq + 1
        words[OPEN_PHASE_WORD] = 0

    def leave_phase(self) -> None:
        """Note in the header that the phase was left without recording it: whose it is will be known later."""
        self.words[OPEN_PHASE_WORD] = 0

    def enter_collective(self, ids: int, t0: int, number: int, size: int, step: int) -> None:
        """Note in the header that a collective was entered; ids = op id | group id << 32, size in bytes."""
        pack_five(self.words, OPEN_COLLECTIVE_BYTE, t0, ids, number, size, step)

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
        words, seq = self.words, self.next
        pack_slot(
            words, self.first_byte + ((seq - 1 & self.mask) << 7),
            seq, COLLECTIVE, t0, t1, step, ids, number, size, t_wait, t_done, dtype_phase, layer_micro_batch, peer_flags,
            0, 0, seq,
        )  # fmt: skip
        self.next = seq + 1
        words[OPEN_COLLECTIVE_WORD] = 0

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
        return self.words[CONTROL_WORD] != 0

    def answer(self, word: str) -> None:
        """What a word of the control page asked for is being done: set it back to 0."""
        self.words[CONTROL_WORD + CONTROL_WORDS.index(word)] = 0

    def close(self, clean: bool = True) -> None:
        """Mark the ring as closed; the file stays for the agent, which removes it once it has everything."""
        for other in self._others.values():
            other.close(clean)
        if os.getpid() == self._pid:
            self.words[CLOSED_WORD] = 1 if clean else 0
        Recorder._living.discard(self)

    def _numbers(
        self, kind: int, rank: int, t: int, step: int, ids: int, count_word: int, values: Sequence[float]
    ) -> None:
        count = len(values)
        if count > _FIRST:
            self._many_numbers(kind | rank << 32, t, step, ids, count_word, values)
            return
        words, seq = self.words, self.next
        at = self.first_word + ((seq - 1 & self.mask) << 4)
        words[at] = seq
        words[at + 1] = kind | rank << 32
        words[at + 2] = t
        words[at + 3] = NULL
        words[at + 4] = step
        words[at + 5] = ids
        words[at + 6] = count_word
        floats, place = self._floats, at + 7
        for value in values:
            floats[place] = value
            place += 1
        words[at + 15] = seq
        self.next = seq + 1

    def _many_numbers(
        self, kind_rank: int, t: int, step: int, ids: int, count_word: int, values: Sequence[float]
    ) -> None:
        more = continuations(len(values))
        seq = self.next
        self.next = seq + 1 + more
        fields = [seq, kind_rank | more << 8, t, NULL, step, ids, count_word, *values[:_FIRST], seq]
        for number in range(1, more + 1):
            end = _FIRST + _NEXT * number
            fields += (seq + number, *values[end - _NEXT : end], -(seq + number))
        missing = 16 * (more + 1) - len(fields)
        fields[-1:-1] = [0.0] * missing
        index = seq - 1 & self.mask
        before_end = min(more + 1, self.mask + 1 - index)
        _slots_of_numbers(before_end, True).pack_into(
            self._map, (self.first_word + (index << 4)) * 8, *fields[: 16 * before_end]
        )
        if before_end <= more:
            rest = _slots_of_numbers(more + 1 - before_end, False)
            rest.pack_into(self._map, self.first_word * 8, *fields[16 * before_end :])

    def _text(self, kind: int, rank: int, t0: int, t1: int, step: int, ids: int, body: dict[str, Any]) -> None:
        payload = json.dumps(body, separators=(",", ":"), default=str).encode() if body else b""
        # One record may take at most a quarter of the ring, or it would overwrite its own beginning.
        payload = payload if len(payload) <= (self.mask + 1) * 28 else b"{}"
        more = continuations(-(-len(payload) // 8))
        padded = payload.ljust(64 + more * 112, b"\0")
        seq = self.next
        self.next = seq + 1 + more
        words = struct.unpack_from("<8q", padded)
        self._pack_slot(seq, kind | more << 8 | rank << 32, t0, t1, step, ids, len(payload), *words, seq)
        for index in range(more):
            seq += 1
            words = struct.unpack_from("<14q", padded, 64 + 112 * index)
            self._pack_slot(seq, *words, -seq)

    def _pack_slot(self, *words: int) -> None:
        pack_slot(self._map, self.first_byte + ((words[0] - 1 & self.mask) << 7), *words)

    def _view(self) -> None:
        self.words = memoryview(self._map).cast("q")
        self._floats = memoryview(self._map).cast("d")

    def _leave_parent(self) -> None:
        # Anonymous memory is only backed when touched: this costs the child nothing until it records.
        self._map = mmap.mmap(-1, self._size)
        self._view()
        self._others = {}


@functools.cache
def _slots_of_numbers(count: int, begins: bool) -> struct.Struct:
    """So many slots of a row or vector, the first of them its beginning or not."""
    return struct.Struct("<" + (_WIDE + _MORE * (count - 1) if begins else _MORE * count))


def _after_fork_in_child() -> None:
    for recorder in list(Recorder._living):
        recorder._leave_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
