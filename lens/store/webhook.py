"""Posts alerts to a URL: from a thread of its own, tried again when nobody answers, never in the way of the server."""

from __future__ import annotations

import json
import logging
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from urllib.parse import urlsplit

from lens.settings import SettingsError
from lens.store.alerts import Alert

logger = logging.getLogger(__name__)

MOST_WAITING = 1000
TIMEOUT_S = 5.0
PAUSES_S = (1.0, 4.0, 15.0, 60.0)
"""Before each further try; a message that fails after the last is dropped, with a line in the log."""


class Webhook:
    """A thread that posts messages in their order. The URL is never logged whole: it often holds a secret."""

    def __init__(self, url: str, link: Callable[[str], str | None] = lambda run: None) -> None:
        """`link` gives the page of a run, if it has one.

        Raises:
            SettingsError: not an http or https URL.
        """
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise SettingsError("alert_webhook must be an http or https URL")
        self._url, self._link, self._host = url, link, address.hostname
        self._waiting: queue.Queue[Alert] = queue.Queue(MOST_WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lens-webhook", daemon=True)

    def start(self) -> None:
        """Start posting."""
        self._thread.start()

    def __call__(self, alert: Alert) -> None:
        """Post it soon; dropped with a line in the log if a thousand wait already."""
        try:
            self._waiting.put_nowait(alert)
        except queue.Full:
            logger.warning("the webhook at %s does not keep up: an alert was not sent (%s)", self._host, alert.text)

    def stop(self) -> None:
        """Send no more; what waits is in the alerts file."""
        self._stopping.set()

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                alert = self._waiting.get(timeout=0.5)
            except queue.Empty:
                continue
            self._deliver(alert)

    def _deliver(self, alert: Alert) -> None:
        body = json.dumps({**asdict(alert), "url": self._link(alert.run)}, ensure_ascii=False).encode()
        for pause in (*PAUSES_S, None):
            reason, permanent = self._post(body)
            if reason is None:
                return
            if permanent or pause is None or self._stopping.wait(pause):
                logger.warning(
                    "the webhook at %s was not told of an alert: %s (%s)", self._host, reason, alert.text
                )
                return

    def _post(self, body: bytes) -> tuple[str | None, bool]:
        """Why it failed (None: it did not), and whether another try is of no use."""
        request = urllib.request.Request(
            self._url, body, {"Content-Type": "application/json", "User-Agent": "lens"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                return None, False
        except urllib.error.HTTPError as error:
            return f"status {error.code}", 400 <= error.code < 500 and error.code not in (408, 429)
        except (OSError, ValueError) as error:
            return str(error), False
