"""Runs diagnosis in a process of its own: numpy over a whole run would hold up everything else in this one.

The process is spawned, never forked (the database would not survive that), is nice to the training that may share
the machine, and ends when this one does, however this one ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lens.store.errors import StoreError, StoreFullError
from lens.store.history import ForgottenError, Histories, TooEarlyError, Update

MOST_WAITING = 8
TIMEOUT_S = 300.0
NICENESS = 10


class DiagnosisWorker:
    """One process that evaluates functions of `lens.diagnosis`, one after the other. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(MOST_WAITING)
        self._pool: ProcessPoolExecutor | None = None

    def evaluate(
        self, names: Sequence[str], run: dict[str, Any], update: Update, upto_step: int | None
    ) -> list[dict[str, Any]]:
        """Results of the functions of these names, on the history that the update continues or begins.

        Raises:
            ForgottenError: the process does not have that history.
            TooEarlyError: what it has begins too late for that step.
            StoreFullError: too many are waiting already.
            StoreError: the function failed, or took too long.
        """
        if not self._places.acquire(blocking=False):
            raise StoreFullError("too many diagnoses are waiting", "ask again in a moment")
        try:
            return self._evaluate(names, run, update, upto_step)
        finally:
            self._places.release()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            _end_processes(pool)

    def _evaluate(self, names: Sequence[str], *arguments: Any) -> list[dict[str, Any]]:
        pool = self._current()
        try:
            return pool.submit(_evaluate, tuple(names), *arguments).result(TIMEOUT_S)
        except (ForgottenError, TooEarlyError):
            raise
        except BrokenProcessPool as error:
            self._discard(pool)
            raise StoreError("the diagnosis process died", "ask again; the server's log may say why") from error
        except FutureTimeoutError as error:
            self._discard(pool)
            raise StoreError(f"the diagnosis took over {TIMEOUT_S:.0f} s", "ask for fewer steps") from error
        except Exception as error:
            raise StoreError(f"the diagnosis failed: {type(error).__name__}: {error}", "see its log") from error

    def _current(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_begin)
            return self._pool

    def _discard(self, pool: ProcessPoolExecutor) -> None:
        with self._lock:
            if self._pool is pool:
                self._pool = None
        pool.shutdown(wait=False, cancel_futures=True)
        _end_processes(pool)


def _end_processes(pool: ProcessPoolExecutor) -> None:
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()


def _begin() -> None:
    """In the new process: leave Ctrl-C to the server, be nice, and never outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(0)

        threading.Thread(target=follow, name="lens-follow", daemon=True).start()


_HISTORIES = Histories()
"""Of the process that judges."""


def _evaluate(
    names: tuple[str, ...], run: dict[str, Any], update: Update, upto_step: int | None
) -> list[dict[str, Any]]:
    return _HISTORIES.evaluate(names, run, update, upto_step)
