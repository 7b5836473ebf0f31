"""Numbers that the training code hands over: a row of values, and the tokens of each expert."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lens.hooks.guard import Part, warn
from lens.hooks.later import Later, is_on_device
from lens.hooks.timeline import Timeline
from lens.recorder import Recorder
from lens.slots import COLUMN_SEPARATOR, series_key

_clock = time.monotonic_ns
_NUMBERS = frozenset((float, int, bool))
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_./-]{0,127}")
_MOST_ROW_SHAPES = 256
"""Sets of names logged together; beyond, each value has a row of its own, or the string table would fill."""


class Values:
    """Writes rows and vectors for the thread that calls."""

    def __init__(self, recorder: Recorder, timeline: Timeline) -> None:
        self.part = Part("values")
        self.later = Later()
        self._recorder = recorder
        self._timeline = timeline
        self._shapes: dict[int, dict[tuple[str, ...], int]] = {}
        self._last: tuple[tuple[str, ...], int] = ((), 0)
        """Names logged last by the thread that trains, and their string id."""
        self.logged: set[str] = set()
        """Every name that the training's own code has logged."""
        self._complained: set[str] = set()
        self._layers: dict[int, _LayerTotals] = {}
        self._write_row = getattr(timeline, "row", None)
        """Writes a row in C, where the timeline is compiled."""

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Record numbers, all at one time. What is no number is left out, with one line about it."""
        names, columns = self._last
        write = self._write_row
        if write is not None and write(columns, names, values, step):
            return
        t = _clock()
        timeline = self._timeline
        number = timeline.step if step is None else step
        if not _NUMBERS.issuperset(map(type, values.values())):
            values = self._readable(values, t, number)
        if not timeline.here():
            self._row(values, t, number)
            return
        if columns and tuple(values) == names:
            self._recorder.row(columns, tuple(values.values()), t, number)
        else:
            self._row(values, t, number)
        timeline.spent += _clock() - t

    def log_found(self, values: Mapping[str, Any], step: int | None) -> None:
        """As `log`, of numbers that a framework logs now and then: they replace none that are read each step."""
        by_hand = set(self.logged)
        self.log(values, step)
        self.logged = by_hand

    def expert_tokens(self, layer: int, counts: Any, dropped: Any) -> None:
        """Record a layer's tokens per expert, before dropping, and its totals since the process was watched."""
        t = _clock()
        step = self._timeline.step
        if is_on_device(counts) or is_on_device(dropped):
            self._experts_later(layer, counts, dropped, t, step)
        else:
            self.record_experts(
                layer, tuple(counts.tolist() if hasattr(counts, "tolist") else counts), dropped, t, step
            )
        if self._timeline.here():
            self._timeline.spent += _clock() - t

    def record_experts(self, layer: int, counts: Sequence[float], dropped: Any, t: int, step: int) -> None:
        """Record counts that have been read already, as of time `t` and `step`."""
        recorder = self._recorder.for_thread()
        recorder.vector(recorder.intern("moe.expert.tokens"), counts, t, step, layer)
        totals = self._layers.get(layer)
        if totals is None:
            totals = self._layers[layer] = _LayerTotals(layer)
        recorder.row(recorder.intern(totals.columns(dropped)), totals.add(sum(counts), dropped), t, step)

    def use_what_arrived(self) -> None:
        """Once a step: record the numbers that have come from a device since."""
        try:
            self.later.use_what_arrived()
        except Exception as error:
            self.part.fail(error)

    def _row(self, values: Mapping[str, Any], t: int, number: int) -> None:
        if not values:
            return
        recorder = self._recorder.for_thread()
        shapes = self._shapes.setdefault(id(recorder), {})
        names = tuple(values)
        columns = shapes.get(names)
        if columns is None:
            checked = {name: value for name, value in values.items() if self._well_named(name)}
            if len(checked) < len(values):
                self._row(checked, t, number)
                return
            if len(shapes) >= _MOST_ROW_SHAPES and len(names) > 1:
                self.logged.update(names)
                for name, value in values.items():
                    recorder.row(recorder.intern(name), (value,), t, number)
                return
            columns = shapes[names] = recorder.intern(COLUMN_SEPARATOR.join(names))
            self.logged.update(names)
        if recorder is self._recorder:
            self._last = names, columns
        recorder.row(columns, tuple(values.values()), t, number)

    def _experts_later(self, layer: int, counts: Any, dropped: Any, t: int, step: int) -> None:
        import torch

        device = counts.device if is_on_device(counts) else dropped.device
        tensors = [torch.as_tensor(counts, device=device)]
        if dropped is not None:
            tensors.append(torch.as_tensor(dropped, device=device))

        def write(numbers: list[float]) -> None:
            if dropped is None:
                self.record_experts(layer, numbers, None, t, step)
            else:
                self.record_experts(layer, numbers[:-1], numbers[-1], t, step)

        self._timeline.errands = True
        self.later.read(tensors, write)

    def _readable(self, values: Mapping[str, Any], t: int, number: int) -> dict[str, float]:
        """The values that can be read now, as numbers; those still on a device are recorded when they arrive."""
        numbers: dict[str, float] = {}
        away: dict[str, Any] = {}
        for name, value in values.items():
            if is_on_device(value) and value.numel() == 1:
                away[name] = value
                continue
            try:
                numbers[name] = float(value)
            except (TypeError, ValueError, RuntimeError):
                self._complain(name, f"{name} = {value!r:.40} is no number and is not recorded")
        if away:
            self._timeline.errands = True
            self.later.read(
                list(away.values()),
                lambda found: self._row(dict(zip(away, found, strict=True)), t, number),
            )
        return numbers

    def _well_named(self, name: str) -> bool:
        if _NAME.fullmatch(name):
            return True
        self._complain(str(name), f"{name!r:.60} is no metric name (letters, digits, _ . / -) and is not recorded")
        return False

    def _complain(self, name: str, text: str) -> None:
        if name not in self._complained:
            self._complained.add(name)
            warn(text)


class _LayerTotals:
    """Tokens of one layer since the process was watched: counters, as the catalogue has them."""

    def __init__(self, layer: int) -> None:
        labels = {"layer": str(layer)}
        self._columns = {
            number: COLUMN_SEPARATOR.join(series_key(metric, labels) for metric in metrics)
            for number, metrics in (
                (1, ("moe.tokens.routed",)),
                (3, ("moe.tokens.routed", "moe.tokens.kept", "moe.tokens.dropped")),
            )
        }
        self._routed = self._kept = self._dropped = 0.0

    def columns(self, dropped: Any) -> str:
        """Names of what `add` returns: without a number of drops nothing is said about them."""
        return self._columns[1 if dropped is None else 3]

    def add(self, routed: float, dropped: Any) -> tuple[float, ...]:
        """The counters after this step: routed = kept + dropped."""
        self._routed += routed
        if dropped is None:
            return (self._routed,)
        lost = float(dropped)
        self._dropped += lost
        self._kept += routed - lost
        return self._routed, self._kept, self._dropped
