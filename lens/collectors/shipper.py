"""Sends spooled batches to the server: in order, once acknowledged never again, and never held up by a bad one.

A thread of its own, so that a slow or absent server never keeps the agent from reading rings. What each answer
means stands in one table, `_MEANING`.
"""

from __future__ import annotations

import gzip
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from urllib.parse import quote

from lens.collectors import segments
from lens.collectors.http import Connection, Reply, ServerAwayError, find_server
from lens.collectors.registration import RunDescription
from lens.collectors.segments import Entry
from lens.collectors.splitting import halve, piece_of
from lens.collectors.spool import RunSpool
from lens.settings import Settings
from lens.slots import CONTENT_TYPE

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 8.0
TRIES_BEFORE_QUARANTINE = 3


class Outcome(Enum):
    """What to do about an answer."""

    DONE = "done"
    REGISTER = "register"
    SPLIT = "split"
    WAIT = "wait"
    REFUSED = "refused"


_MEANING = {
    401: Outcome.WAIT,
    403: Outcome.WAIT,
    404: Outcome.REGISTER,
    408: Outcome.WAIT,
    413: Outcome.SPLIT,
    425: Outcome.WAIT,
    429: Outcome.WAIT,
}


def meaning(status: int) -> Outcome:
    """What a status means for the batch that was sent."""
    if 200 <= status < 300:
        return Outcome.DONE
    return _MEANING.get(status, Outcome.REFUSED if 400 <= status < 500 else Outcome.WAIT)


def compress(body: bytes) -> tuple[bytes, str]:
    """The body, compressed by zstd where the package is there, else by gzip; and the encoding's name."""
    if _zstd is not None:
        return _zstd.ZstdCompressor(level=1).compress(body), "zstd"
    return gzip.compress(body, 1, mtime=0), "gzip"


def decompress(body: bytes, encoding: str) -> bytes:
    """The body as it was before `compress`.

    Raises:
        OSError: it was written by zstd and the package is not there any more.
    """
    if encoding == "gzip":
        return gzip.decompress(body)
    if _zstd is None:
        raise OSError("a spooled batch needs the package zstandard to be read")
    data: bytes = _zstd.ZstdDecompressor().decompress(body)
    return data


def _import_zstd() -> Any:
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard


_zstd = _import_zstd()


@dataclass
class Lane:
    """One run's way to the server."""

    spool: RunSpool
    description: RunDescription
    registered: int = 0
    """Version of the description that the server has."""
    not_before: float = 0.0
    wait_s: float = FIRST_WAIT_S
    refusals: dict[int, int] = field(default_factory=dict)
    last_error: str = ""


class Shipper:
    """Ships every lane's batches until stopped.

    Args:
        settings: server, token, data folder.
        say: where the one line about a change for the worse or the better goes.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._lanes: dict[str, Lane] = {}
        self._connections: dict[str, Connection] = {}
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lens-shipper", daemon=True)
        self.rejected = 0
        """Records the server turned down one by one, inside batches it took."""

    def start(self) -> None:
        """Begin to ship."""
        self._thread.start()

    def add(self, spool: RunSpool, description: RunDescription) -> None:
        """Ship this run too."""
        self._lanes[spool.run] = Lane(spool, description)
        self.notify()

    def remove(self, run: str) -> None:
        """Ship this run no longer."""
        self._lanes.pop(run, None)

    def notify(self) -> None:
        """Something new was spooled."""
        self._wake.set()

    @property
    def waiting(self) -> int:
        """Batches that wait for the server."""
        return sum(lane.spool.waiting for lane in list(self._lanes.values()))

    def reachable(self) -> bool:
        """Whether an address to ship to is known at all."""
        return any(self._server(lane) is not None for lane in list(self._lanes.values()))

    def stop(self, timeout_s: float) -> int:
        """Ship what can be shipped in this time, then end; the number of batches left in the spool."""
        deadline = time.monotonic() + timeout_s
        for lane in list(self._lanes.values()):
            lane.not_before = 0.0
        while self.waiting and self.reachable() and time.monotonic() < deadline:
            self.notify()
            time.sleep(0.02)
        self._stopping.set()
        self.notify()
        self._thread.join(max(0.1, deadline - time.monotonic()))
        return self.waiting

    def _run(self) -> None:
        while not self._stopping.is_set():
            worked = False
            now = time.monotonic()
            soonest = now + 1.0
            for lane in list(self._lanes.values()):
                if lane.not_before > now:
                    soonest = min(soonest, lane.not_before)
                elif self._work_to_do(lane):
                    worked = self._serve_safely(lane) or worked
                    soonest = min(soonest, lane.not_before) if lane.not_before > now else soonest
            if not worked:
                self._wake.wait(max(0.01, soonest - time.monotonic()))
                self._wake.clear()
        for connection in self._connections.values():
            connection.close()

    def _work_to_do(self, lane: Lane) -> bool:
        return bool(lane.spool.waiting) or lane.registered < lane.description.version

    def _serve_safely(self, lane: Lane) -> bool:
        """A batch that breaks the shipper itself must not end the shipping of all others."""
        try:
            return self._serve(lane)
        except Exception as error:
            reply = Reply(400, {"error": f"{type(error).__name__}: {error}"})
            entry = lane.spool.oldest()
            if entry is not None:
                return self._refused(lane, entry, b"", "", reply)
            self._postpone(lane, reply.error, None)
            return False

    def _serve(self, lane: Lane) -> bool:
        """One request of a lane; False when it has to wait."""
        server = self._server(lane)
        if server is None:
            lane.not_before = time.monotonic() + 1.0
            return False
        connection = self._connections.setdefault(server.url, Connection(server.url))
        headers = {"Authorization": f"Bearer {server.token}"} if server.token else {}
        try:
            if lane.registered < lane.description.version:
                return self._register(lane, connection, headers)
            entry = lane.spool.oldest()
            return entry is not None and self._send(lane, entry, connection, headers)
        except ServerAwayError as error:
            self._postpone(lane, str(error), None)
            return False

    def _server(self, lane: Lane) -> Any:
        return find_server(self._settings, lane.description.server)

    def _register(self, lane: Lane, connection: Connection, headers: Mapping[str, str]) -> bool:
        version, body = lane.description.to_json()
        reply = connection.post("/api/v1/runs", body, {**headers, "Content-Type": "application/json"})
        if meaning(reply.status) is Outcome.DONE:
            lane.registered = version
            self._recover(lane)
            return True
        self._postpone(lane, f"the server does not take the run: {reply.error}", reply.retry_after_s)
        return False

    def _send(self, lane: Lane, entry: Entry, connection: Connection, headers: Mapping[str, str]) -> bool:
        try:
            body = segments.read_body(entry)
        except (segments.DamagedError, FileNotFoundError) as error:
            # Gone because the spool was full: the next look finds another batch. Else the disk has lost it.
            if lane.spool.oldest() is entry:
                lane.spool.give_up(entry)
                self._say(f"batch {entry.sequence} of run {lane.spool.run} is lost: {error}")
            return True
        except OSError as error:
            self._postpone(lane, f"the spool cannot be read: {error}", None)
            return False
        encoding = str(entry.head["encoding"])
        pieces = lane.spool.pieces.get(str(entry.sequence))
        source, path = lane.spool.source, ""
        if pieces:
            path = pieces[0]
            source = f"{source}/{entry.sequence}/{path}"
            body, encoding = compress(piece_of(decompress(body, encoding), path))
        reply = self._post_records(lane, connection, headers, body, encoding, source, entry.sequence)
        if reply.status == 415 and encoding != "gzip":
            plain = gzip.compress(decompress(body, encoding), 1, mtime=0)
            reply = self._post_records(lane, connection, headers, plain, "gzip", source, entry.sequence)
        return self._settle(lane, entry, body, encoding, path, reply)

    def _post_records(
        self,
        lane: Lane,
        connection: Connection,
        headers: Mapping[str, str],
        body: bytes,
        encoding: str,
        source: str,
        sequence: int,
    ) -> Reply:
        more = {
            **headers,
            "Content-Type": CONTENT_TYPE,
            "Content-Encoding": encoding,
            "Lens-Source": source,
            "Lens-Sequence": str(sequence),
        }
        return connection.post(f"/api/v1/runs/{quote(lane.spool.run, safe='')}/records", body, more)

    def _settle(self, lane: Lane, entry: Entry, body: bytes, encoding: str, path: str, reply: Reply) -> bool:
        """Do what the answer asks for; False when the lane has to wait."""
        outcome = meaning(reply.status)
        if outcome is Outcome.DONE:
            self._count_rejected(reply)
            self._piece_done(lane, entry, path)
            self._recover(lane)
            return True
        if outcome is Outcome.SPLIT and self._split(lane, entry, body, encoding, path):
            return True
        if outcome is Outcome.REGISTER:
            lane.registered = 0
            self._postpone(lane, "the server does not know the run; registering it again", reply.retry_after_s)
            return False
        if outcome is Outcome.WAIT:
            self._postpone(lane, reply.error, reply.retry_after_s)
            return False
        return self._refused(lane, entry, body, path, reply)

    def _refused(self, lane: Lane, entry: Entry, body: bytes, path: str, reply: Reply) -> bool:
        tries = lane.refusals[entry.sequence] = lane.refusals.get(entry.sequence, 0) + 1
        if tries < TRIES_BEFORE_QUARANTINE and meaning(reply.status) is Outcome.REFUSED:
            self._postpone(lane, reply.error, reply.retry_after_s)
            return False
        lane.refusals.pop(entry.sequence, None)
        self._say(
            f"batch {entry.sequence} of run {lane.spool.run} is put aside, the server refuses it: {reply.error}"
        )
        if path:
            lane.spool.counts.quarantined += 1
            self._piece_done(lane, entry, path)
        else:
            lane.spool.quarantine(entry, body, reply.error)
        return True

    def _split(self, lane: Lane, entry: Entry, body: bytes, encoding: str, path: str) -> bool:
        """Send it in halves from now on; False when it cannot be halved."""
        if halve(decompress(body, encoding)) is None:
            return False
        pieces = lane.spool.pieces.get(str(entry.sequence), [path])
        lane.spool.split(entry, [path + "0", path + "1", *pieces[1:]])
        return True

    def _piece_done(self, lane: Lane, entry: Entry, path: str) -> None:
        left = lane.spool.pieces.get(str(entry.sequence), [])[1:] if path else []
        if left:
            lane.spool.split(entry, left)
        else:
            lane.spool.acknowledge(entry.sequence)

    def _count_rejected(self, reply: Reply) -> None:
        rejected = reply.content.get("rejected")
        if not rejected:
            return
        if not self.rejected:
            self._say(f"the server turned down {len(rejected)} records of a batch, the first: {rejected[0]}")
        self.rejected += len(rejected)

    def _postpone(self, lane: Lane, error: str, retry_after_s: float | None) -> None:
        """Wait longer each time, with jitter so that many agents do not come back at once."""
        wait = retry_after_s if retry_after_s is not None else lane.wait_s * random.uniform(0.5, 1.0)
        lane.wait_s = min(LONGEST_WAIT_S, lane.wait_s * 2)
        lane.not_before = time.monotonic() + wait
        if error != lane.last_error:
            lane.last_error = error
            self._say(f"{error}; keeping what comes in the spool")

    def _recover(self, lane: Lane) -> None:
        if lane.last_error:
            self._say(f"shipping run {lane.spool.run} again")
        lane.last_error, lane.wait_s, lane.not_before = "", FIRST_WAIT_S, 0.0
