"""Runs that serve requests: queues, caches, prefills in the way, owners of experts that decode too much, cold starts.

Each is judged by what requests and servers tell of themselves; a run that tells nothing of the kind is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lens.diagnosis import decoding, notices, queues, starting
from lens.diagnosis.arrays import Array, Floats
from lens.diagnosis.decoding import Decoded
from lens.diagnosis.examine import Examiner
from lens.diagnosis.notices import Cause, Notice
from lens.diagnosis.requests import Requests, Sign, paced
from lens.slots import NULL

CAUSES = {
    "kv_cache_exhausted": Cause(
        "Give the cache of keys and values more memory (a smaller or quantised cache, more tensor parallelism), admit fewer "
        "requests at once, or bound their length: what is put back is computed twice.",
        brings=("queue_overload", "prefill_interference"),
    ),
    "prefill_interference": Cause(
        "Cut prefills into smaller chunks, limit the prompt tokens of one iteration, or prefill on other cards than those "
        "that decode.",
    ),
    "decode_expert_imbalance": Cause(
        "Replicate the experts of {ranks} that get most tokens, place them on different ranks, or decode larger batches, "
        "which spread more evenly.",
        absorbs=("compute",), brings=("hot_expert",),
    ),
    "queue_overload": Cause(
        "Add servers or places in the batch, or turn requests away earlier: more arrive than are served, and no request "
        "itself is slow.",
        brings=("prefill_interference",),
    ),
    "cold_start": Cause(
        "Send requests of every shape through a server before it gets traffic (compile, capture graphs, load weights), and "
        "keep compiled code where the next start finds it.",
        absorbs=("compute", "host", "data"), brings=("queue_overload",),
    ),
}  # fmt: skip

PROMPT_STEPS = 60
"""Iterations for which a rank may be slower than its peers for prompts of its own."""
TOGETHER = ("ep", "tp", "pp")
"""Kinds of groups whose ranks go through every iteration together."""
LEANS = 0.35
"""Share of the time that another cache is full."""
WAITING = ("infer.queue.depth", "infer.requests.waiting")


@dataclass(frozen=True)
class Serving:
    """What a run tells of its requests. origin: the moment (ns) from which seconds count. serves: and it does not train."""

    run: Examiner
    requests: Requests | None
    origin: int
    batch: dict[str, Floats]
    decoded: Decoded | None
    paced: bool
    serves: bool

    @classmethod
    def of(cls, run: Examiner) -> Serving:
        """Read requests, batches and what routers told of decoding."""
        found = Requests.of(run.tables, run.timeline, run.topology)
        requests, origin = found if found is not None else (None, _earliest(run))
        has_steps = paced(run.timeline)
        batch = decoding.iterations(run) if has_steps else {}
        trains = "backward" in run.frame.phase or "optimizer" in run.frame.phase
        serves = (requests is not None or bool(batch)) and not trains
        decoded = Decoded.of(run, batch, origin) if serves else None
        return cls(run, requests, origin, batch, decoded, has_steps, serves)

    def at(self, place: int) -> list[Notice]:
        """What holds up requests, up to a place; -1 asks of a run without steps."""
        if self.paced != (place >= 0):
            return []
        seen = (
            None
            if self.requests is None
            else self.requests.only(self.requests.visible <= place)
            if self.paced
            else self.requests
        )
        servers = {} if seen is None else self._servers(seen)
        signs = [
            sign
            for rows, part in servers.items()
            for sign in (queues.overloaded(part, rows), starting.cold(part, rows))
        ]
        if not any(sign is not None and sign.cause == "queue_overload" for sign in signs) and seen is not None:
            ranks = [(row,) for rows in servers if len(rows) > 1 for row in rows]
            signs += [queues.overloaded(seen.only(seen.row == rows[0]), rows) for rows in ranks]
        told = {row for rows, part in servers.items() if np.isfinite(part.arrived).mean() >= 0.5 for row in rows}
        signs += [self._deep(row, place) for row in sorted(self._rows(WAITING) - told)]
        caches = self._rows(("infer.kv_cache.usage", "infer.preemptions"))
        if seen is not None:
            caches |= set(seen.row[seen.preempted > 0].tolist())
        signs += [self._full(row, place, seen) for row in sorted(caches)]
        # While a cold start is made up for, every prompt stands in the others' way: that is not how the server works.
        warm = max(
            (s.over for s in signs if s is not None and s.cause == "cold_start" and s.over is not None),
            default=-np.inf,
        )
        first = self._place(warm) if np.isfinite(warm) else 0
        crowded = decoding.crowded(self.run, self.batch, first, place) if self.paced else None
        if not {"prefill", "decode"} <= set(self.batch):
            signs += [decoding.delayed(part.only(part.begun > warm), rows) for rows, part in servers.items()]
        found = self._merged(
            [sign for sign in signs if sign is not None], {row for rows in servers for row in rows}, caches, place
        )
        lopsided = None
        if self.decoded is not None:
            decoded = self.decoded.until(place) if self.paced else self.decoded
            lopsided = decoding.lopsided(self.run, decoded, seen, self.paced)
        return found + [notice for notice in (crowded, lopsided) if notice is not None]

    def _servers(self, seen: Requests) -> dict[tuple[int, ...], Requests]:
        """Requests by the ranks that work on them together: those that share experts, tensors or a pipeline."""
        together = {int(row): {int(row)} for row in np.unique(seen.row)}
        for name, members in self.run.topology.members.items():
            rows = set(self.run.topology.row(np.array(members, np.int64)).tolist()) & set(together)
            if name.split("/")[0] in TOGETHER and len(rows) > 1:
                whole = set[int]().union(*(together[row] for row in rows))
                together.update(dict.fromkeys(whole, whole))
        wholes = sorted({tuple(sorted(whole)) for whole in together.values()})
        return {rows: seen.only(np.isin(seen.row, rows)) for rows in wholes}

    def _merged(self, signs: list[Sign], servers: set[int], caches: set[int], place: int) -> list[Notice]:
        """One notice for each cause: where all servers show it, it sits in none of them."""
        found = []
        for cause in sorted({sign.cause for sign in signs}):
            mine = [sign for sign in signs if sign.cause == cause]
            worst = max(mine, key=lambda sign: (sign.ratio or 0.0, sign.confidence, sign.rows))
            rows = {row for sign in mine for row in sign.rows}
            of_cache = cause == "kv_cache_exhausted"
            if of_cache:
                rows |= {row for row in caches - rows if self._leans(row, place, worst.began)}
            everywhere = rows >= (caches if of_cache else servers | rows) and not (of_cache and len(rows) == 1)
            held = () if everywhere else notices.listed(row for row in rows if row >= 0)
            if cause == "cold_start":
                held = self._late(worst, held) or held
            said = worst.said if not held else f"{{ranks}}: {worst.said}"
            found.append(Notice(
                cause, held, self._place(min(sign.began for sign in mine)),
                None if worst.over is None or not self.paced else self._place(worst.over),
                worst.confidence, said, worst.evidence, None, rivals=worst.rivals, requests=worst.ratio,
            ))  # fmt: skip
        return found

    def _late(self, sign: Sign, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Those of some ranks (() = all) that the others of them waited for in a cold start; () where none stands out."""
        if sign.over is None or not self.paced:
            return ()
        frame = self.run.frame
        among = np.array(rows or range(frame.shape[1]), np.int64)
        until = self.origin + round(sign.over * 1e9)
        ended = self.run.timeline.ended_ns
        late = starting.late_rows(frame.self_time[:, among], frame.blocked[:, among], ended, until)
        return () if late is None else notices.listed(among[late])

    def _place(self, seconds: float) -> int:
        """The step place at a moment, -1 without steps."""
        if not self.paced:
            return -1
        ended = self.run.timeline.ended_ns
        return min(int(np.searchsorted(ended, self.origin + round(seconds * 1e9))), len(ended) - 1)

    def _rows(self, metrics: Iterable[str]) -> set[int]:
        """Rows that send one of these."""
        known = [self.run.signals.series(metric) for metric in metrics]
        return {int(row) for series in known if series is not None for row in np.unique(series.row)}

    def _gauge(self, metric: str, row: int, place: int) -> tuple[Floats, Floats]:
        """Values up to a place and their seconds."""
        series = self.run.signals.series(metric)
        if series is None:
            return np.zeros(0), np.zeros(0)
        part = series.of(row, 0, max(place, 0)) if self.paced else series.of(row, 0, len(self.run.timeline))
        order = np.argsort(series.t_ns[part], kind="stable")
        seconds: Floats = (series.t_ns[part][order] - self.origin) * np.float64(1e-9)
        return series.value[part][order], seconds

    def _depth(self, row: int, place: int) -> tuple[Floats, Floats]:
        """Requests in the queue, by whichever name they are told."""
        return next(
            (read for name in WAITING if len((read := self._gauge(name, row, place))[0])),
            (np.zeros(0), np.zeros(0)),
        )

    def _deep(self, row: int, place: int) -> Sign | None:
        depth, t = self._depth(row, place)
        return queues.deepening(depth, t, self._gauge("infer.requests.running", row, place)[0], (row,))

    def _usage(self, row: int, place: int) -> tuple[Floats, Floats, Array]:
        """Use of a cache, when it was read, and whether it was full then."""
        usage, t = self._gauge("infer.kv_cache.usage", row, place)
        places, since = self._gauge("infer.requests.running", row, place)
        running = places[np.searchsorted(since, t, "right") - 1] if len(places) else np.full(len(t), np.nan)
        return usage, t, queues.is_full(usage, running)

    def _leans(self, row: int, place: int, began: float) -> bool:
        """Whether a cache is full so often since a moment that it shares the lot of those that are exhausted."""
        _, t, full = self._usage(row, place)
        return bool((t >= began).any()) and float(full[t >= began].mean()) >= LEANS

    def _full(self, row: int, place: int, seen: Requests | None) -> Sign | None:
        usage, t, full = self._usage(row, place)
        count, read = self._gauge("infer.preemptions", row, place)
        put_back = (np.maximum(np.diff(count), 0.0), read[1:]) if len(count) > 1 else None
        depth, when = self._depth(row, place)
        waiting = depth[when >= t[full][0]] if full.any() else depth[:0]
        mine = _none() if seen is None else seen.only(seen.row == row)
        return queues.exhausted(usage, t, full, put_back, waiting, mine, (row,))


def _none() -> Requests:
    empty, none = np.zeros(0), np.zeros(0, np.int64)
    return Requests(none, none, empty, empty, empty, empty, empty, empty, empty)


def _earliest(run: Examiner) -> int:
    times = run.tables.samples["t_ns"]
    return int(times[times != NULL].min()) if len(times) else 0
