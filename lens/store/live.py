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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from numpy.typing import NDArray

from lens.slots import NULL
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

Key = tuple[str, str | None]
"""Metric and canonical JSON of its labels."""
Columns = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]
"""Steps, ranks (-1 = none) and values, equally long."""


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
    open_phases: dict[tuple[str, int], tuple[int, float]] = field(default_factory=dict)
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
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._event.wait(), timeout)
        self._event.clear()


class LiveFeed:
    """Recent cells of each run, for any number of clients; every method may be called from any thread."""

    def __init__(self, window_cells: int = WINDOW_CELLS, max_runs: int = MAX_RUNS) -> None:
        self._window_cells = window_cells
        self._max_runs = max_runs
        # Cursors start at the clock so that one from before a restart is seen to be foreign.
        self._first_cursor = time.time_ns() // 1_000_000
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self._lock = threading.Lock()

    def publish(self, run_id: str, tables: Tables) -> None:
        """Take records that were just made durable; cheap, never waits for a client."""
        window = self._window(run_id)
        now = time.monotonic()
        with window.lock:
            _note_arrivals(window, tables, now)
            cells = _extract(tables, window.open_phases)
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
        window = self._window(run_id)
        with window.lock:
            oldest = window.entries[0].cursor if window.entries else window.cursor + 1
            reset = since is not None and not oldest - 1 <= since <= window.cursor
            start = window.cursor if since is None or reset else since
            entries, news = list(window.entries), window.diagnosis_cursor > (-1 if since is None else start)
            header: dict[str, Any] = {
                "cursor": window.cursor,
                "reset": reset,
                "age_s": None if window.arrived is None else round(time.monotonic() - window.arrived, 3),
                "ranks_reporting": _reporting(window.last_arrival),
                "world_size": world_size,
                "last_step": window.last_step,
            }
            if (news or reset) and window.diagnosis is not None:
                header |= {"diagnosis": window.diagnosis, "ledger": window.ledger}
        horizon = time.monotonic() - BACKLOG_S
        chosen: dict[Key, list[Columns]] = {}
        for entry in entries:
            new, recent = entry.cursor > start, entry.arrived >= horizon
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


def _reporting(last_arrival: Mapping[int, float]) -> int:
    horizon = time.monotonic() - REPORTING_S
    return sum(arrived >= horizon for arrived in last_arrival.values())


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


def _extract(tables: Tables, open_phases: dict[tuple[str, int], tuple[int, float]]) -> dict[Key, Columns]:
    """The cells of a batch: durations and tokens of steps, time in each phase, samples and vectors with a step."""
    cells: dict[Key, Columns] = {}
    steps = tables.steps
    finished = steps["t1_ns"] != NULL
    if finished.any():
        step, rank = steps["step"][finished], steps["rank"][finished]
        seconds = (steps["t1_ns"][finished] - steps["t0_ns"][finished]) / 1e9
        cells["step.duration", None] = _columns(step, rank, seconds)
        tokens = steps["tokens"][finished]
        if (known := tokens != NULL).any():
            cells["step.tokens", None] = _columns(step[known], rank[known], tokens[known])
    cells.update(_phase_cells(tables, open_phases))
    _sample_cells(tables, cells)
    _vector_cells(tables, cells)
    return cells


def _phase_cells(
    tables: Tables, open_phases: dict[tuple[str, int], tuple[int, float]]
) -> Iterator[tuple[Key, Columns]]:
    """Seconds of each (phase, rank, step). A phase may repeat within a step and its parts may come in several
    batches: `open_phases` carries the sum so far of the newest step of each phase and rank."""
    spans = tables.spans
    rows = (spans["kind"] == tables.code("phase")) & (spans["t1_ns"] != NULL) & (spans["step"] != NULL)
    if not rows.any():
        return
    keys = np.stack([spans["name"][rows], spans["rank"][rows], spans["step"][rows]], axis=1)
    groups, member = np.unique(keys, axis=0, return_inverse=True)
    seconds = np.bincount(member.ravel(), (spans["t1_ns"][rows] - spans["t0_ns"][rows]) / 1e9, len(groups))
    # Rows are sorted by name, rank, step: only the first and last step of a (name, rank) can touch another batch.
    change = np.flatnonzero(np.any(groups[1:, :2] != groups[:-1, :2], axis=1)) + 1
    starts, ends = np.append(0, change), np.append(change, len(groups)) - 1
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        name, rank, first_step = groups[start].tolist()
        carry_key = (tables.strings[name], rank)
        carried = open_phases.get(carry_key)
        if carried is not None and carried[0] == first_step:
            seconds[start] += carried[1]
        open_phases[carry_key] = (int(groups[end, 2]), float(seconds[end]))
    for name in np.unique(groups[:, 0]).tolist():
        of_phase = groups[:, 0] == name
        labels = json.dumps({"phase": tables.strings[name]}, separators=(",", ":"))
        yield ("phase.duration", labels), _columns(groups[of_phase, 2], groups[of_phase, 1], seconds[of_phase])


def _sample_cells(tables: Tables, cells: dict[Key, Columns]) -> None:
    samples = tables.samples
    with_step = np.flatnonzero(samples["step"] != NULL)
    if not len(with_step):
        return
    names = np.stack([samples["metric"][with_step], samples["labels"][with_step]], axis=1)
    for metric, labels in np.unique(names, axis=0).tolist():
        rows = with_step[(names[:, 0] == metric) & (names[:, 1] == labels)]
        key = (tables.strings[metric], tables.string(labels))
        cells[key] = _columns(samples["step"][rows], samples["rank"][rows], samples["value"][rows])


def _vector_cells(tables: Tables, cells: dict[Key, Columns]) -> None:
    """Pre-reduced vectors of large runs: no rank, no layer, one value a rank."""
    vectors = tables.vectors
    rows = (vectors["rank"] < 0) & (vectors["layer"] < 0) & (vectors["step"] != NULL)
    for row in np.flatnonzero(rows).tolist():
        metric, values = tables.strings[vectors["metric"][row]], tables.values_of(row)
        if metric.startswith("moe."):  # one value an expert, not a rank
            continue
        key = (metric, tables.string(int(vectors["labels"][row])))
        added = _columns(np.full(len(values), vectors["step"][row]), np.arange(len(values)), values)
        known = cells.get(key)
        if known is not None:
            added = (
                np.concatenate([known[0], added[0]]),
                np.concatenate([known[1], added[1]]),
                np.concatenate([known[2], added[2]]),
            )
        cells[key] = added


def _columns(steps: NDArray[Any], ranks: NDArray[Any], values: NDArray[Any]) -> Columns:
    return steps.astype(np.int32), ranks.astype(np.int32), values.astype(np.float32)


router = APIRouter()


@router.websocket("/api/v1/runs/{run}/live")
async def live(websocket: WebSocket, run: str, cursor: int | None = None) -> None:
    """Binary frames of one run; the client sends ``{"subscribe": [metric, …]}`` whenever its charts change."""
    await websocket.accept()
    client = _Client(websocket, run, cursor)
    # The reader is what notices that the client, or the whole server, is going: without it shutdown would hang.
    tasks = {asyncio.create_task(client.read()), asyncio.create_task(client.write())}
    _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if not any(isinstance(result, WebSocketDisconnect) for result in results):
        with contextlib.suppress(RuntimeError):
            await websocket.close(1013)


class _Client:
    """One open page."""

    def __init__(self, websocket: WebSocket, run: str, cursor: int | None) -> None:
        self._websocket = websocket
        self._feed: LiveFeed = websocket.app.state.live
        self._run = run
        self._cursor = cursor
        self._metrics: set[str] = set()
        self._added: set[str] = set()
        self._changed = asyncio.Event()

    async def read(self) -> None:
        """Take subscriptions until the client goes.

        Raises:
            WebSocketDisconnect: it went.
        """
        while True:
            text = await self._websocket.receive_text()
            try:
                wanted = json.loads(text).get("subscribe", [])
                metrics = {str(metric) for metric in wanted[:MAX_METRICS]}
            except (ValueError, AttributeError, TypeError):
                await self._websocket.send_text('{"error":"not a subscription","hint":"send {\\"subscribe\\":[]}"}')
                continue
            # Somebody who resumes from a cursor already has what came before it.
            if self._metrics or self._cursor is None:
                self._added |= metrics - self._metrics
            self._metrics = metrics
            self._changed.set()

    async def write(self) -> None:
        """Send frames, at most one every `FRAME_S` and at least one every `IDLE_S` seconds.

        Raises:
            WebSocketDisconnect, asyncio.TimeoutError: the client went, or does not take what it is sent.
        """
        world_size = await self._world_size()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), IDLE_S)
        with self._feed.listen(self._run) as waker:
            while True:
                added, self._added = self._added, set()
                self._cursor, frame = self._feed.frame(self._run, self._cursor, self._metrics, added, world_size)
                await asyncio.wait_for(self._websocket.send_bytes(frame), SEND_S)
                await asyncio.sleep(FRAME_S)
                self._changed.clear()
                if not self._added:
                    await self._either(waker)

    async def _either(self, waker: Waker) -> None:
        """Wait for data, for a changed subscription, or for `IDLE_S` seconds."""
        tasks = {asyncio.create_task(waker.wait(IDLE_S)), asyncio.create_task(self._changed.wait())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _world_size(self) -> int | None:
        try:
            run = await asyncio.to_thread(self._websocket.app.state.query.run, self._run)
        except LookupError:
            return None
        size = run.get("world_size") if run else None
        return int(size) if size is not None else None
