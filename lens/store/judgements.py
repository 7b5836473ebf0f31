"""The verdict and the ledger of a run, worked out once for what is known of it and kept until more is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from lens.store.folder import DataFolder
from lens.store.history import FEWEST_STEPS, MOST_OF_RUN, ForgottenError, TooEarlyError, Update
from lens.store.readback import newest, read_tables
from lens.store.runs import Run
from lens.tables import Begin, Tables

Evaluate = Callable[[Sequence[str], dict[str, Any], Update, "int | None"], list[dict[str, Any]]]
"""Runs functions of `lens.diagnosis`, given by name, on the history of a run (see `history`)."""
DIAGNOSIS, LEDGER = "diagnose", "ledger"
_MOST_KEPT = 64


class Judgements:
    """What `evaluate` answered about the runs of a data folder. Thread-safe."""

    def __init__(self, folder: DataFolder, evaluate: Evaluate) -> None:
        self._folder, self._evaluate = folder, evaluate
        self._one_at_a_time: dict[str, threading.Lock] = {}
        self._kept: OrderedDict[tuple[Any, ...], dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, run: str, upto_step: int | None, *names: str) -> list[dict[str, Any]]:
        """The answers of the named functions about a run, all from one reading of its records.

        Raises:
            UnknownRunError: there is no such run.
            StoreBehindError: acknowledged records have not reached the database in time.
        """
        keys = [(name, run, upto_step, self._folder.registry.state_of(run)) for name in names]
        if (known := self._all_kept(keys)) is not None:
            return known
        # One at a time for a run: its history grows in order, and who waited finds the answer of who was first.
        with self._one_at_a_time.setdefault(run, threading.Lock()):
            if (known := self._all_kept(keys)) is not None:
                return known
            self._folder.settle()
            answers = self._judged(self._folder.registry.run(run), names, upto_step)
            with self._lock:
                self._kept.update(zip(keys, answers, strict=True))
                while len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
        return answers

    def _all_kept(self, keys: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]] | None:
        with self._lock:
            known = [self._kept[key] for key in keys if key in self._kept]
        return known if len(known) == len(keys) else None

    def _judged(self, run: Run, names: tuple[str, ...], upto_step: int | None) -> list[dict[str, Any]]:
        folder, described = self._folder, {**run.described, "run": run.id}

        def read(upto: int | None = None) -> tuple[int, Tables, Begin | None]:
            with folder.applier.quiet(folder.limits.read_wait_s) as applied:
                series = folder.registry.series(run.number)
                begin, where = newest(folder.store, run.number, MOST_OF_RUN // 2, FEWEST_STEPS, upto)
                return applied, read_tables(folder.store, run.number, series, where), begin

        try:
            try:
                update = folder.arrivals.update(run.number, read)
                return self._evaluate(names, described, update, upto_step)
            except ForgottenError:
                folder.arrivals.drop(run.number)
                update = folder.arrivals.update(run.number, read)
                return self._evaluate(names, described, update, upto_step)
        except TooEarlyError:
            _, tables, begin = read(upto_step)
            past = Update((-run.number, 0), True, (tables,), begin, past=True)
            return self._evaluate(names, described, past, upto_step)
        except BaseException:
            folder.arrivals.drop(run.number)
            raise
