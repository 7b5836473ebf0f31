"""Requests: when their tokens came, what their prefill and decode did, what they keep; recorded when they have ended.

Nothing waits for a device: on one, moments are events that are compared once they have passed.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from lens.hooks.drafts import Drafts
from lens.hooks.experts import Experts
from lens.hooks.guard import Part
from lens.hooks.kv_cache import Room, kv_bytes, room
from lens.hooks.later import is_on_device
from lens.hooks.memory import StageMemory
from lens.hooks.timeline import Timeline
from lens.hooks.values import Values
from lens.hooks.work import batch_size
from lens.recorder import Recorder
from lens.slots import COLUMN_SEPARATOR, NULL, canonical, series_key

_clock = time.monotonic_ns
CACHES = ("past_key_values", "cache")
"""What transformers calls keys and values, in its releases."""
PREFILL, DECODE = "prefill", "decode"
_MOST_UNRESOLVED = 256
"""Requests whose moments on a device have not passed yet; beyond, the oldest are given up."""


class Moment:
    """A point in a request's time: on the host, and on the device where one computes."""

    __slots__ = ("event", "ns")

    def __init__(self, on_device: bool) -> None:
        self.ns = _clock()
        self.event: Any = None
        if on_device:
            import torch

            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def passed(self) -> bool:
        """Whether the device has come to it."""
        return self.event is None or bool(self.event.query())

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier moment to this one, by the device's clock where both have one."""
        if self.event is not None and earlier.event is not None:
            return float(earlier.event.elapsed_time(self.event)) / 1e3
        return (self.ns - earlier.ns) / 1e9


class Stage:
    """Prefill or decode of one request: from its first forward pass to its last."""

    __slots__ = ("began", "ended", "memory", "passes", "tables", "tokens")

    def __init__(self, began: int, on_device: bool) -> None:
        self.began = began
        self.ended = began
        self.memory = StageMemory(on_device)
        self.passes = 0
        self.tokens = 0
        self.tables: dict[Any, Any] = {}
        """Tokens of experts, as `Experts` counts them."""


class Request:
    """One request, as a ``with`` block: say `token` when one has been made; see ``lens.request``."""

    def __init__(
        self,
        requests: Requests,
        model: str,
        prompt_tokens: int | None,
        batch: int | None,
        queue_s: float | None,
        on_device: bool = False,
    ) -> None:
        self._requests = requests
        self._on_device = on_device
        self._kv: Any = None
        self.model = model
        self.prompt_tokens = prompt_tokens
        """Of all sequences of the batch together."""
        self.batch = batch
        self.queue_s = queue_s
        self.kv_cache_bytes: int | None = None
        self.kv_cache_room: Room | None = None
        self.output_tokens = 0
        """Of one sequence."""
        self.put_back = 0
        self.begin: Moment | None = None
        self.first: Moment | None = None
        self.last: Moment | None = None
        self.stages: dict[str, Stage] = {}
        self.now: Stage | None = None
        """The stage that the forward pass under way belongs to."""
        self.drafts: Drafts | None = None
        """What was drafted for it, where tokens are."""

    def __enter__(self) -> Request:
        self._requests.running += 1
        self.begin = Moment(self._on_device)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._requests.running -= 1
        if kind is None:
            self._requests.finish(self)

    def token(self, count: int = 1) -> None:
        """So many tokens of each sequence have been made since the last call, or since the beginning."""
        self.last = Moment(self._on_device)
        self.first = self.first or self.last
        self.output_tokens += count

    def preempted(self, count: int = 1) -> None:
        """It has been put back so many times, to be computed again when there is room."""
        self.put_back += count
        self._requests.put_back += count

    def cache(self, past_key_values: Any) -> None:
        """Measure this cache of keys and values: one of transformers, or (key, value) tensors a layer.

        How full it is is told where its size is fixed.
        """
        self.kv_cache_bytes = kv_bytes(past_key_values)
        self.kv_cache_room = room(past_key_values)

    def pass_begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass of the model begins."""
        if self.drafts is not None and self.drafts.drafting:
            return  # a model that drafts for itself
        size = batch_size(args, kwargs)
        tokens, length = size if size is not None else (0, 0)
        # Where tokens are drafted, a pass of several tokens is no part of the prompt.
        prefills = length > 1 and DECODE not in self.stages and self.drafts is None
        kind = PREFILL if prefills or not self.stages else DECODE
        self.now = self.stages.get(kind)
        if self.now is None:
            for earlier in self.stages.values():
                earlier.memory.end()
            self.now = self.stages[kind] = Stage(_clock(), self._on_device)
        if self.now.passes == 0 and self.drafts is not None and kind == PREFILL:
            self.drafts.with_prompt = self.drafts.drafted
        self.now.passes += 1
        self.now.tokens += tokens
        if kind == PREFILL and size is not None:
            self.batch = tokens // max(1, length)

    def pass_ends(self, output: Any, kwargs: dict[str, Any]) -> None:
        """It has ended: with a prefill, or a part of one, comes the first token."""
        stage, self.now = self.now, None
        if stage is None:
            return
        stage.ended = _clock()
        self.last = Moment(self._on_device)
        if DECODE not in self.stages:
            self.first = self.last
        # What it returns is the newest: caches that are not changed in place are given as they were before.
        found = _cache(output) if isinstance(output, dict) else None
        self._kv = found if found is not None else _cache(kwargs)

    def close(self, output_tokens: int | None) -> None:
        """All forward passes have ended."""
        held, self._kv = self._kv, None
        if held is not None:
            self.cache(held)
        for stage in self.stages.values():
            stage.memory.end()
        passes = sum(stage.passes for name, stage in self.stages.items() if name == DECODE)
        self.output_tokens = output_tokens if output_tokens is not None else passes + bool(self.stages)
        drafts = self.drafts
        if drafts is not None and output_tokens is not None:
            drafts.accepted = output_tokens - (passes + self.stages[PREFILL].passes) if self.stages else 0
        if self.prompt_tokens is None and PREFILL in self.stages:
            tokens = self.stages[PREFILL].tokens - (drafts.with_prompt if drafts is not None else 0)
            self.prompt_tokens = tokens or None


class Requests:
    """The requests of this process."""

    def __init__(
        self, recorder: Recorder, timeline: Timeline, values: Values, experts: Experts, trains: Callable[[], bool]
    ) -> None:
        self.part = Part("requests")
        self.running = 0
        """Requests being worked on."""
        self.put_back = 0
        """Times that requests were put back, since the process was watched."""
        self._recorder = recorder
        self.timeline = timeline
        self.trains = trains
        """Whether this process also trains."""
        self._values = values
        self._experts = experts
        self._numbers = itertools.count(1)
        self._prompt = self._generated = 0
        self._unresolved: deque[tuple[Request, int]] = deque(maxlen=_MOST_UNRESOLVED)
        self.part.at_end(self._resolve)

    def request(
        self,
        model: str,
        prompt_tokens: int | None,
        batch: int | None,
        queue_s: float | None,
        on_device: bool = False,
    ) -> Request:
        """A request that begins with its ``with`` block."""
        return Request(self, model, prompt_tokens, batch, queue_s, on_device)

    def divert_experts(self, stage: Stage | None) -> None:
        """Count the tokens of experts for this stage of a request instead of for a step; None: no longer."""
        self._experts.diverted = None if stage is None else stage.tables

    def finish(self, request: Request) -> None:
        """Record a request that has ended."""
        if not self.part.on:
            return
        try:
            now, number = _clock(), next(self._numbers)
            self._count(request, now)
            self._spans(request, now, number)
            self._unresolved.append((request, now))
            self._resolve()
            self._values.use_what_arrived()
        except Exception as error:
            self.part.fail(error)

    def _count(self, request: Request, now: int) -> None:
        """Numbers that are known on the host."""
        self._prompt += request.prompt_tokens or 0
        self._generated += request.output_tokens * (request.batch or 1)
        values: dict[str, float | None] = {
            "infer.tokens.prompt": self._prompt,
            "infer.tokens.generated": self._generated,
            "infer.requests.running": self.running,
            "infer.batch.size": request.batch,
            "infer.kv_cache.bytes": request.kv_cache_bytes,
            "infer.kv_cache.usage": self._usage(request.kv_cache_room, now),
            # Who never says so is not known to put nothing back.
            "infer.preemptions": self.put_back or None,
            **(request.drafts.numbers() if request.drafts is not None else {}),
        }
        for kind, stage in request.stages.items():
            values[series_key("infer.memory.peak", {"kind": kind})] = stage.memory.peak
            if stage.tokens:
                values[series_key("infer.batch.tokens", {"kind": kind})] = stage.tokens / stage.passes
            self._count_experts(kind, stage, now)
        self._row(values, now)

    def _usage(self, room: Room | None, now: int) -> float | None:
        """How full the cache is; None where that is not known, or told later because a device has yet to count it."""
        if room is None:
            return None
        counts = [kept for kept in room.kept if is_on_device(kept)]
        if not counts:
            return room.usage([float(kept) for kept in room.kept])
        if len({kept.device for kept in counts}) > 1:
            return None  # what is read together lies on one device
        # A cache goes on counting in the same tensor: that is not looked at any more.
        known = [None if is_on_device(kept) else float(kept) for kept in room.kept]

        def write(numbers: list[float]) -> None:
            arrived = iter(numbers)
            usage = room.usage([next(arrived) if kept is None else kept for kept in known])
            self._row({"infer.kv_cache.usage": usage}, now)

        self._values.later.read(counts, write)
        return None

    def _count_experts(self, kind: str, stage: Stage, now: int) -> None:
        for table in stage.tables.values():
            recorder, width, layers = self._recorder.for_thread(), table.counts.shape[1], dict(table.layers)
            ids = [recorder.intern(text) for text in ("infer.expert.tokens", canonical({"kind": kind}))]

            def write(
                numbers: list[float], layers: dict[int, int] = layers, width: int = width, ids: list[int] = ids
            ) -> None:
                for row, layer in layers.items():
                    part = numbers[row * width : (row + 1) * width]
                    self._recorder.for_thread().vector(ids[0], part, now, NULL, layer, ids[1])

            if is_on_device(table.counts):
                self._values.later.read([table.counts], write)
            else:
                write(table.counts.reshape(-1).tolist())

    def _spans(self, request: Request, now: int, number: int) -> None:
        recorder, step = self._recorder.for_thread(), self.timeline.step
        attributes: dict[str, Any] = {
            "number": number,
            "prompt_tokens": request.prompt_tokens,
            "output_tokens": request.output_tokens,
            "batch": request.batch,
            "preemptions": request.put_back or None,
        }
        if request.drafts is not None and request.drafts.drafted:
            attributes |= {"drafted": request.drafts.drafted, "accepted": request.drafts.accepted}
        if request.first is not None and request.first.event is None and request.begin is not None:
            attributes["t_first_token_ns"] = request.first.ns + time.time_ns() - _clock()
        if request.queue_s is not None:
            attributes["queue_ns"] = round(request.queue_s * 1e9)
        known = {key: value for key, value in attributes.items() if value is not None}
        began = request.begin.ns if request.begin is not None else now
        recorder.span("request", request.model, began, now, step, known)
        for kind, stage in request.stages.items():
            told = {"number": number, "tokens": stage.tokens, "passes": stage.passes, "batch": request.batch}
            recorder.span("inference", kind, stage.began, stage.ended, step, told)

    def _resolve(self) -> None:
        """Record the times of requests whose moments have passed, oldest first; never waits."""
        while self._unresolved:
            request, ended = self._unresolved[0]
            if request.last is not None and not request.last.passed():
                return
            self._unresolved.popleft()
            begin, first, last = request.begin, request.first, request.last
            labels = {"model": request.model}
            values: dict[str, float | None] = {series_key("infer.request.queue_time", labels): request.queue_s}
            if begin is not None:
                values[series_key("infer.request.duration", labels)] = (ended - begin.ns) / 1e9
            if begin is not None and first is not None and last is not None:
                values[series_key("infer.request.ttft", labels)] = first.since(begin)
                if request.output_tokens > 1:
                    between = last.since(first) / (request.output_tokens - 1)
                    values[series_key("infer.request.tpot", labels)] = between
            self._row(values, ended)

    def _row(self, values: dict[str, float | None], now: int) -> None:
        known = {key: float(value) for key, value in values.items() if value is not None}
        if known:
            recorder = self._recorder.for_thread()
            columns = recorder.intern(COLUMN_SEPARATOR.join(known))
            recorder.row(columns, tuple(known.values()), now, self.timeline.step)


def _cache(held: dict[str, Any]) -> Any:
    """The keys and values in a call or its output."""
    # Not by attribute or get: for names that are going away transformers prints a warning then.
    return next((found for name in CACHES if (found := dict.get(held, name)) is not None), None)
