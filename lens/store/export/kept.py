"""Arrow streams as they were last answered: a run that has not changed since is not read again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace

from lens.store.export.exporter import Export, Wanted

MOST_BYTES = 64 << 20
MOST_OF_ONE = 16 << 20
"""A million samples, lz4, take about 5 MB; what is larger is read from the database each time."""
Key = tuple[int, Wanted]
"""Number of a run, and what was wanted of it."""
State = tuple[int, int, int]


class KeptExports:
    """Answers and the state of the run that they are of. Thread-safe."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, tuple[State, Export, bytes]] = OrderedDict()
        self._size = 0

    def get(self, key: Key, state: State) -> Export | None:
        """The answer, if the run still is in this state."""
        with self._lock:
            known = self._kept.get(key)
            if known is None:
                return None
            if known[0] != state:
                self._drop(key)
                return None
            self._kept.move_to_end(key)
        return replace(known[1], parts=iter((known[2],)))

    def keeping(self, key: Key, state_of: Callable[[], State | None], export: Export) -> Export:
        """The same answer; it is kept once it was read to its end, unless it is large.

        `state_of` gives the state of the run that the answer is of, None if it has changed meanwhile.
        """
        return replace(export, parts=self._read(key, state_of, export))

    def _read(self, key: Key, state_of: Callable[[], State | None], export: Export) -> Iterator[bytes]:
        parts: list[bytes] = []
        size = 0
        for part in export.parts:
            size += len(part)
            if size <= MOST_OF_ONE:
                parts.append(part)
            else:
                parts.clear()
            yield part
        state = state_of()
        if size <= MOST_OF_ONE and state is not None:
            with self._lock:
                self._drop(key)
                self._kept[key] = (state, replace(export, parts=iter(())), b"".join(parts))
                self._size += size
                while self._size > self._most_bytes:
                    self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        known = self._kept.pop(key, None)
        self._size -= len(known[2]) if known else 0
