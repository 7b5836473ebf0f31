"""Keeps the verdict on every live run fresh: evaluated again after new records, never more than it is worth."""

from __future__ import annotations

import logging
import threading
import time

from lens.store.alerts import Alerts
from lens.store.errors import StoreError
from lens.store.live import LiveFeed
from lens.store.query import Query

logger = logging.getLogger(__name__)

EVERY_S = 2.0
SHARE = 5.0
"""An evaluation that took t seconds is not repeated for this many times t."""


class Verdicts:
    """A thread that evaluates runs marked as changed, hands verdict and ledger to the live feed, and raises alerts."""

    def __init__(self, query: Query, live: LiveFeed, alerts: Alerts) -> None:
        self._query, self._live, self._alerts = query, live, alerts
        self._due: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="lens-verdicts", daemon=True)

    def start(self) -> None:
        """Start working."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; an evaluation under way may still finish."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def mark(self, run: str) -> None:
        """Note that something was said about a run."""
        with self._changed:
            if run not in self._due:
                self._due[run] = max(time.monotonic() + EVERY_S / 2, self._not_before.get(run, 0.0))
                self._changed.notify_all()

    def _next(self) -> str | None:
        """The run to evaluate now; None when it is time to stop."""
        with self._changed:
            while not self._stopping:
                run = min(self._due, key=self._due.__getitem__, default=None)
                if run is None:
                    self._changed.wait()
                    continue
                left = self._due[run] - time.monotonic()
                if left <= 0:
                    del self._due[run]
                    return run
                self._changed.wait(left)
            return None

    def _work(self) -> None:
        while (run := self._next()) is not None:
            began = time.monotonic()
            try:
                diagnosis, ledger = self._query.verdict(run)
                self._live.publish_diagnosis(run, diagnosis, ledger)
                self._alerts.update(run, diagnosis)
            except StoreError as error:
                if not self._stopping:
                    logger.warning("no verdict on run %s: %s", run, error)
            took = time.monotonic() - began
            with self._changed:
                self._not_before[run] = time.monotonic() + max(EVERY_S / 2, SHARE * took)
