"""The live feed: what just arrived, pushed to open pages over one binary websocket a page.

`LiveFeed` keeps a short window of cells (metric, step, rank, value) of each run in memory; ingest publishes to
it, websocket clients read from it at their own pace. A client holds nothing but a cursor, so a slow one gets its
backlog merged into one frame, and one that fell behind the window is told to load the history again (``reset``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect

from lens.slots import NULL
from lens.store.live_cells import Carry, Columns, Key, cells_of
from lens.tables import Tables

WINDOW_CELLS = 262_144
"""Cells kept for each run (12 bytes each)."""
MAX_RUNS = 8
"""Runs kept; the one that was published to least recently goes first."""
BACKLOG_S = 10.0
"""A metric subscribed to just now starts with what arrived in this many seconds, so that nothing falls between
the page's request for the history and its first frame."""
REPORTING_S = 10.0
"""A rank of which something arrived in this many seconds is reporting."""
FRAME_S = 0.03
"""Shortest time between two frames of one client."""
IDLE_S = 1.0
"""A frame without cells is sent after this long, so that the page's data age stays true."""
SEND_S = 10.0
"""A client that does not take a frame in this many seconds is dropped; it reconnects from its cursor."""
MAX_METRICS = 64
NOT_A_SUBSCRIPTION = '{"error":"not a subscription","hint":"send {\\"subscribe\\": [metric, …]}"}'


@dataclass(frozen=True)
class Entry:
    """The cells of one publication."""

    cursor: int
    arrived: float
    cells: dict[Key, Columns]

    @property
    def count(self) -> int:
        """How many cells it holds."""
        return sum(len(columns[0]) for columns in self.cells.values())


@dataclass
class Window:
    """What is remembered of one run."""

    cursor: int
    entries: deque[Entry] = field(default_factory=deque)
    cells: int = 0
    last_step: int | None = None
    arrived: float | None = None
    last_arrival: dict[int, float] = field(default_factory=dict)
    carry: Carry = field(default_factory=Carry)
    diagnosis: dict[str, Any] | None = None
    ledger: dict[str, Any] | None = None
    diagnosis_cursor: int = -1
    wakers: set[Waker] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Waker:
    """Wakes one client's task from any thread, without ever waiting for it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def wake(self) -> None:
        """Ask the client's task to look again; harmless once its loop is gone."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout: float) -> None:
        """Return when woken, or after `timeout` seconds."""
        with anyio.move_on_after(timeout):
            await self._event.wait()
        self._event.clear()


class LiveFeed:
    """Recent cells of each run, for any number of clients; every method may be called from any thread."""

    def __init__(
        self,
        window_cells: int = WINDOW_CELLS,
        max_runs: int = MAX_RUNS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._window_cells = window_cells
        self._max_runs = max_runs
        # Cursors start at the clock so that one from before a restart is seen to be foreign.
        self._first_cursor = time.time_ns() // 1_000_000
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self._lock = threading.Lock()

    def publish(self, run_id: str, tables: Tables) -> None:
        """Take records that were just made durable; cheap, never waits for a client."""
        window = self._window(run_id)
        now = self._clock()
        with window.lock:
            _note_arrivals(window, tables, now)
            cells = cells_of(tables, window.carry)
            window.cursor += 1
            entry = Entry(window.cursor, now, cells)
            window.entries.append(entry)
            window.cells += entry.count
            while window.cells > self._window_cells and len(window.entries) > 1:
                window.cells -= window.entries.popleft().count
            wakers = list(window.wakers)
        for waker in wakers:
            waker.wake()

    def publish_diagnosis(
        self, run_id: str, reply: dict[str, Any] | None, ledger: dict[str, Any] | None = None
    ) -> None:
        """Take a new diagnosis and ledger; every client of the run gets them with its next frame."""
        window = self._window(run_id)
        with window.lock:
            window.diagnosis, window.ledger = reply, ledger
            window.cursor += 1
            window.diagnosis_cursor = window.cursor
            wakers = list(window.wakers)
        for waker in wakers:
            waker.wake()

    def diagnosis(self, run_id: str) -> dict[str, Any] | None:
        """The newest diagnosis of a run; None if there was none since the server started."""
        window = self._windows.get(run_id)
        return window.diagnosis if window is not None else None

    @contextlib.contextmanager
    def listen(self, run_id: str) -> Iterator[Waker]:
        """A waker that is woken whenever something of this run is published; call it on the event loop."""
        window = self._window(run_id)
        waker = Waker()
        with window.lock:
            window.wakers.add(waker)
        try:
            yield waker
        finally:
            with window.lock:
                window.wakers.discard(waker)

    def frame(
        self,
        run_id: str,
        since: int | None,
        metrics: Collection[str],
        added: Collection[str] = (),
        world_size: int | None = None,
    ) -> tuple[int, bytes]:
        """Everything after the cursor `since`, merged into one binary frame; the new cursor comes first.

        `added` are metrics subscribed to since the last frame: of these the last `BACKLOG_S` seconds come along.
        """
        window, now = self._window(run_id), self._clock()
        with window.lock:
            oldest = window.entries[0].cursor if window.entries else window.cursor + 1
            reset = since is not None and not oldest - 1 <= since <= window.cursor
            start = window.cursor if since is None or reset else since
            entries, news = list(window.entries), window.diagnosis_cursor > (-1 if since is None else start)
            header: dict[str, Any] = {
                "cursor": window.cursor,
                "reset": reset,
                "age_s": None if window.arrived is None else round(now - window.arrived, 3),
                "ranks_reporting": sum(now - arrived <= REPORTING_S for arrived in window.last_arrival.values()),
                "world_size": world_size,
                "last_step": window.last_step,
            }
            if (news or reset) and window.diagnosis is not None:
                header |= {"diagnosis": window.diagnosis, "ledger": window.ledger}
        chosen: dict[Key, list[Columns]] = {}
        for entry in entries:
            new, recent = entry.cursor > start, now - entry.arrived <= BACKLOG_S
            for key, columns in entry.cells.items():
                if (new and key[0] in metrics) or (recent and key[0] in added):
                    chosen.setdefault(key, []).append(columns)
        return header["cursor"], encode_frame(header, chosen)

    def _window(self, run_id: str) -> Window:
        with self._lock:
            window = self._windows.get(run_id)
            if window is None:
                window = self._windows[run_id] = Window(cursor=self._first_cursor)
                self._forget()
            self._windows.move_to_end(run_id)
            return window

    def _forget(self) -> None:
        """Drop the oldest runs that nobody listens to."""
        for run_id in list(self._windows)[:-1]:
            if len(self._windows) <= self._max_runs:
                return
            if not self._windows[run_id].wakers:
                del self._windows[run_id]


def encode_frame(header: dict[str, Any], blocks: Mapping[Key, list[Columns]]) -> bytes:
    """One binary frame: u32 length of the header, JSON header padded to 8 bytes, then for each block
    Int32 step[n], Int32 rank[n], Float32 value[n], all little-endian."""
    described, body = [], []
    for (metric, labels), parts in blocks.items():
        steps, ranks, values = (np.concatenate(column) for column in zip(*parts, strict=True))
        block: dict[str, Any] = {"metric": metric, "n": len(steps)}
        if labels is not None:
            block["labels"] = json.loads(labels)
        described.append(block)
        body += [steps.astype("<i4").tobytes(), ranks.astype("<i4").tobytes(), values.astype("<f4").tobytes()]
    text = json.dumps({**header, "blocks": described}, separators=(",", ":"), default=str).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return b"".join([struct.pack("<I", len(text)), text, *body])


def _note_arrivals(window: Window, tables: Tables, now: float) -> None:
    """Remember when records and which ranks were last heard of, which ranks ended, and the newest step."""
    if tables.total:
        window.arrived = now
    for name in ("steps", "spans", "collectives", "samples", "events"):
        for rank in np.unique(tables.table(name)["rank"]).tolist():
            if rank >= 0:
                window.last_arrival[rank] = now
    events = tables.events
    for rank in events["rank"][events["kind"] == tables.code("process.exit")].tolist():
        window.last_arrival.pop(rank, None)
    finished = tables.steps["step"][tables.steps["t1_ns"] != NULL]
    if len(finished):
        window.last_step = max(int(finished.max()), window.last_step if window.last_step is not None else -1)


router = APIRouter()


@router.websocket("/api/v1/runs/{run}/live")
async def live(websocket: WebSocket, run: str, cursor: int | None = None) -> None:
    """Binary frames of one run; the client sends ``{"subscribe": [metric, …]}``, again when its charts change."""
    await websocket.accept()
    await _Client(websocket, run, cursor).serve()


class _Client:
    """One open page."""

    def __init__(self, websocket: WebSocket, run: str, cursor: int | None) -> None:
        self._websocket = websocket
        self._feed: LiveFeed = websocket.app.state.live
        self._run = run
        self._cursor = cursor
        self._metrics: set[str] | None = None
        self._added: set[str] = set()
        self._gone = False

    async def serve(self) -> None:
        """Read and write until the client goes, or no longer takes what it is sent."""
        with self._feed.listen(self._run) as waker:
            async with anyio.create_task_group() as group:
                # The reader is what notices that client or server are going: without it shutdown would hang.
                for job in (self._read, self._write):
                    group.start_soon(self._until_end, job, waker, group.cancel_scope)
        if not self._gone:
            with contextlib.suppress(RuntimeError), anyio.move_on_after(1):
                await self._websocket.close(1013)

    async def _until_end(
        self, job: Callable[[Waker], Awaitable[None]], waker: Waker, scope: anyio.CancelScope
    ) -> None:
        try:
            await job(waker)
        except WebSocketDisconnect:
            self._gone = True
        except TimeoutError:
            pass  # too slow: it reconnects from its cursor
        finally:
            scope.cancel()

    async def _read(self, waker: Waker) -> None:
        while True:
            text = await self._websocket.receive_text()
            try:
                wanted = json.loads(text)["subscribe"]
                metrics = {str(metric) for metric in wanted[:MAX_METRICS]}
            except (ValueError, KeyError, TypeError):
                await self._websocket.send_text(NOT_A_SUBSCRIPTION)
                continue
            # Somebody who resumes from a cursor already has what came before it.
            if self._metrics is not None or self._cursor is None:
                self._added |= metrics - (self._metrics or set())
            self._metrics = metrics
            waker.wake()

    async def _write(self, waker: Waker) -> None:
        world_size = await self._world_size()
        while True:
            if self._metrics is not None:
                added, self._added = self._added, set()
                self._cursor, frame = self._feed.frame(self._run, self._cursor, self._metrics, added, world_size)
                with anyio.fail_after(SEND_S):
                    await self._websocket.send_bytes(frame)
                await anyio.sleep(FRAME_S)
            await waker.wait(IDLE_S)

    async def _world_size(self) -> int | None:
        try:
            run = await anyio.to_thread.run_sync(self._websocket.app.state.query.run, self._run)
        except LookupError:
            return None
        size = run.get("world_size")
        return int(size) if size is not None else None
