"""A run's records kept as columns where they are judged, so that judging again costs what is new and not what is old.

The server notes what comes in for runs that are being judged (`Arrivals`) and hands it over as an `Update`; the process
that judges (`Histories`) appends it to what it has. A run not noted from its beginning is read from the database once.
A run is judged by its newest steps, as many as fit into `MOST_OF_RUN`: what it costs does not grow with its length.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lens.slots import NULL
from lens.store.readback import without_closed
from lens.tables import DTYPES, SCHEMA, STEP_BEARING, TIME_COLUMN, Begin, Column, Tables

MOST_BYTES = 1 << 30
"""What all histories together may take; the run judged longest ago goes first."""
MOST_OF_RUN = 5_000_000
"""Records that a run is judged by at most; of more, the newest steps with half as many. About 400 MB, and 2 to 4 seconds."""
FEWEST_STEPS = 64
"""So many steps are judged, however much a step records."""
MOST_ARRIVED_BYTES = 128 << 20
"""What may wait for the next judgement, of all runs together; the largest is dropped first and read again."""


class ForgottenError(RuntimeError):
    """The process that judges does not have the history that an update continues."""


class TooEarlyError(RuntimeError):
    """The history begins after the step up to which a run is to be judged, or too shortly before it."""


@dataclass(frozen=True)
class Update:
    """What is new of a run; `key` names the history it continues, or begins if it is `fresh`. begin: from where on the
    run was read, None for all of it. past: it is of an earlier part of the run, read for one question."""

    key: tuple[int, int]
    fresh: bool
    parts: tuple[Tables, ...]
    begin: Begin | None = None
    past: bool = False


Read = Callable[[], "tuple[int, Tables, Begin | None]"]
"""Reads what the database has of a run: up to which offset of the log that is, the records, and from where on they are."""


class History:
    """Columns that grow at their end, over one pool of strings. begin: what is older was left out, and is not taken."""

    def __init__(self, begin: Begin | None = None) -> None:
        self.begin = begin
        self._pool: dict[str, int] = {}
        self._columns = {
            name: {c: _Growing(DTYPES[k]) for c, k in schema.items()} for name, schema in SCHEMA.items()
        }
        self._values = _Growing(np.dtype("<f8"))

    @property
    def size(self) -> int:
        """Bytes, about."""
        columns = (column for table in self._columns.values() for column in table.values())
        return sum(column.size for column in columns) + self._values.size + 100 * len(self._pool)

    @property
    def count(self) -> int:
        """Records held."""
        return sum(next(iter(columns.values())).count for columns in self._columns.values())

    def shortened(self, most: int) -> History:
        """The newest steps with at most so many records, and what came meanwhile without a step."""
        tables = self.tables()
        named = [tables.table(name)["step"] for name in STEP_BEARING]
        steps, counts = np.unique(np.concatenate(named), return_counts=True)
        steps, counts = steps[steps != NULL], counts[steps != NULL]
        newer = np.cumsum(counts[::-1])[::-1]
        place = min(int(np.searchsorted(-newer, -most)), len(steps) - FEWEST_STEPS)
        if place <= 0:
            return self
        first = int(steps[place])
        began = [
            int(tables.table(name)[TIME_COLUMN[name]][step == first].min(initial=np.iinfo(np.int64).max))
            for name, step in zip(STEP_BEARING, named, strict=True)
        ]
        result = History(Begin(first, min(began)))
        result.append(tables)
        return result

    def append(self, part: Tables) -> None:
        """Take more records."""
        if self.begin is not None:
            part = part.since(self.begin)
        # The database knows no difference between no text and an empty one.
        codes = [self._pool.setdefault(text, len(self._pool)) if text else -1 for text in part.strings]
        mapping = np.array([*codes, -1], "<i4")
        shift = self._values.count
        for name, schema in SCHEMA.items():
            for column, kind in schema.items():
                data = part.table(name)[column]
                if kind == "s":
                    data = mapping[data]
                elif column == "offset":
                    data = data + shift
                self._columns[name][column].append(data)
        self._values.append(part.vector_values)

    def tables(self) -> Tables:
        """Everything so far, without open spans that were closed later. Valid until more is taken."""
        result = Tables(strings=list(self._pool), vector_values=self._values.array)
        for name, columns in self._columns.items():
            setattr(result, name, without_closed(name, {column: each.array for column, each in columns.items()}))
        return result


class Histories:
    """Judges runs, and keeps what it needs to judge them again."""

    def __init__(self, most_bytes: int = MOST_BYTES, most_of_run: int = MOST_OF_RUN) -> None:
        self._most_bytes, self._most_of_run = most_bytes, most_of_run
        self._kept: OrderedDict[tuple[int, int], History] = OrderedDict()

    def evaluate(
        self, names: Sequence[str], run: dict[str, Any], update: Update, upto_step: int | None
    ) -> list[dict[str, Any]]:
        """Results of the functions of `lens.diagnosis` of these names.

        Raises:
            ForgottenError: the history that the update continues is not here; a fresh one is needed.
            TooEarlyError: what is here begins too late for that step.
        """
        from lens import diagnosis

        history = History(update.begin) if update.fresh else self._kept.pop(update.key, None)
        if history is None:
            raise ForgottenError
        for part in update.parts:
            history.append(part)
        if history.count > self._most_of_run:
            history = history.shortened(self._most_of_run // 2)
        self._keep(update.key, history)
        begin = history.begin
        early = begin is not None and upto_step is not None and upto_step < begin.step + FEWEST_STEPS
        if early and not update.past:
            raise TooEarlyError
        tables = history.tables()
        replies: list[dict[str, Any]] = [getattr(diagnosis, name)(run, tables, upto_step) for name in names]
        for reply in replies:
            if begin is not None and "coverage" in reply:
                reply["coverage"]["signals_missing"].append(f"steps before {begin.step}")
        return replies

    def _keep(self, key: tuple[int, int], history: History) -> None:
        for older in [each for each in self._kept if each[0] == key[0]]:
            del self._kept[older]
        self._kept[key] = history
        while sum(each.size for each in self._kept.values()) > self._most_bytes:
            self._kept.popitem(last=False)


@dataclass
class _Noted:
    """What came for one run since it was last judged."""

    key: tuple[int, int]
    parts: list[tuple[int, Tables]] = field(default_factory=list)
    size: int = 0
    judged: bool = False
    """Whether a history of this key was begun."""


class Arrivals:
    """Notes records on their way into the database. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._noted: dict[int, _Noted] = {}
        self._generations = itertools.count(1)

    def begin(self, number: int) -> None:
        """Note a run from now on."""
        with self._lock:
            self._noted[number] = _Noted((number, next(self._generations)))

    def drop(self, number: int) -> None:
        """Note it no longer: its history is broken."""
        with self._lock:
            self._noted.pop(number, None)

    def add(self, number: int, end: int, tables: Tables) -> None:
        """Records of a run, in the order of the log; `end` is the offset after them."""
        with self._lock:
            noted = self._noted.get(number)
            if noted is None:
                return
            noted.parts.append((end, tables))
            noted.size += 100 * tables.total + tables.vector_values.nbytes
            while sum(each.size for each in self._noted.values()) > MOST_ARRIVED_BYTES:
                del self._noted[max(self._noted, key=lambda each: self._noted[each].size)]

    def update(self, number: int, read: Read) -> Update:
        """What is new of a run since the last update. `read` is called only if the run was not noted so far."""
        with self._lock:
            known = number in self._noted
        if not known:
            # Noting begins before reading: what both have is told apart by its offset.
            self.begin(number)
            applied, tables, begin = read()
            return self._taken(number, applied, (tables,), begin) or Update((number, 0), True, (tables,), begin)
        return self._taken(number, -1, ()) or self.update(number, read)

    def _taken(
        self, number: int, applied: int, first: tuple[Tables, ...], begin: Begin | None = None
    ) -> Update | None:
        with self._lock:
            noted = self._noted.get(number)
            if noted is None:
                return None
            parts = (*first, *(tables for end, tables in noted.parts if end > applied))
            update = Update(noted.key, not noted.judged, parts, begin)
            noted.parts, noted.size, noted.judged = [], 0, True
            return update


class _Growing:
    """An array with room at its end."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._room: Column = np.empty(0, dtype)
        self.count = 0

    @property
    def array(self) -> Column:
        """What it holds."""
        return self._room[: self.count]

    @property
    def size(self) -> int:
        """Bytes taken."""
        return self._room.nbytes

    def append(self, data: Column) -> None:
        """Add values at the end."""
        needed = self.count + len(data)
        if needed > len(self._room):
            grown = np.empty(max(needed, len(self._room) * 3 // 2), self._room.dtype)
            grown[: self.count] = self.array
            self._room = grown
        self._room[self.count : needed] = data
        self.count = needed
