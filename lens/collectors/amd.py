"""AMD cards through amdsmi, or through the driver's files where no amdsmi can be used.

Both are doors to the same cards: a table of questions each, one way to say what an error means. A question that a
card does not answer is asked once and named in `lens.collector.supported` with the reason; a card that fell off the
bus marks only itself failed. The same code reads simulated cards: `lens.collectors.simulated` puts a stand-in in
the library's place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lens.collectors.amd_library import LibraryAbsentError, open_library
from lens.collectors.amd_sources import Row
from lens.collectors.amd_sysfs import SysfsDoor
from lens.collectors.cards import Card, CardCollector, clock_below_maximum
from lens.collectors.protocol import CollectorEvent, DeviceInfo, Probe, ProcessUse, Reading
from lens.collectors.simulated.profiles import find_profile

_NOTICE_WAIT_S = 1.0
_SILENT_AFTER = 2
"""Answers without a value after which a metric counts as not given."""


class _Door(Protocol):
    """One way to the cards; a card is whatever `handles` gives."""

    rows: tuple[Row, ...]

    def handles(self) -> Sequence[Any]: ...
    def describe(self, card: Any) -> dict[str, Any]: ...
    def judge(self, card: Any, error: Exception) -> tuple[str, str]: ...
    def alive(self, card: Any) -> bool: ...
    def processes(self, card: Any) -> Iterator[tuple[int, int | None]]: ...
    def events(self, cards: Mapping[str, Any], timeout_s: float) -> Sequence[CollectorEvent] | None: ...
    def close(self) -> None: ...


@dataclass
class _Card(Card):
    refused: dict[Row, str] = field(default_factory=dict)
    """Reason by question: asked once, left out since."""
    given: set[str] = field(default_factory=set)
    """Metrics that have had a value."""
    silent: dict[str, int] = field(default_factory=dict)
    """Answers without a value, by metric that never had one."""
    uncorrected: float | None = None


class AmdCollector(CardCollector[_Card]):
    """Readings of every AMD card of this host.

    Args:
        host: the host's name; card i is called ``host/gpu<i>``.
        simulated: whether what lies beneath is a simulation; then every reading says so.
        root: where /sys and /opt/rocm hang.
    """

    backend = "amd"

    def __init__(self, host: str, simulated: bool = False, root: Path = Path("/")) -> None:
        super().__init__(host, simulated)
        self._root = root
        self._door: _Door | None = None

    def probe(self) -> Probe:
        """Find the cards, by amdsmi first. Never raises, never prints."""
        reasons = []
        for open_door in (open_library, SysfsDoor):
            try:
                door: _Door = open_door(self._root)
                handles = door.handles()
            except LibraryAbsentError as error:
                reasons.append(str(error))
                continue
            if handles:
                self._door = door
                self._cards = [self._open_card(handle, index) for index, handle in enumerate(handles)]
                return Probe(True)
            door.close()
        return Probe(False, "; ".join([*reasons, "no card of the amdgpu driver under /sys/class/drm"]))

    def events(self, timeout_s: float) -> Sequence[CollectorEvent]:
        """Resets, hangs, memory errors, lost cards; waits in the library, so call it from a thread of its own."""
        deadline = time.monotonic() + timeout_s
        found = self._reported()
        while not found and (left := deadline - time.monotonic()) > 0:
            cards = {card.info.name: card.handle for card in self._cards if not card.lost}
            noticed = self._door.events(cards, min(left, _NOTICE_WAIT_S)) if self._door else None
            # With a library that waits, this only looks; without one, this is the wait.
            found = self._reported(left) if noticed is None else [*noticed, *self._reported()]
        return found

    def processes(self) -> Sequence[ProcessUse]:
        """Compute processes by card; memory is None where the driver hides it."""
        if self._door is None:
            return []
        return [
            ProcessUse(pid, card.info.name, size)
            for card in self._cards
            if not card.lost
            for pid, size in self._door.processes(card.handle)
        ]

    def close(self) -> None:
        """Let go of the library."""
        if self._door is not None:
            self._door.close()
        self._door = None
        self._cards = []

    def _open_card(self, handle: Any, index: int) -> _Card:
        assert self._door is not None
        known = self._door.describe(handle)
        model = known.get("model", "AMD card of unknown model")
        profile = find_profile(model)
        info = DeviceInfo(
            uuid=known.get("uuid", ""),
            index=index,
            name=f"{self._host}/gpu{index}",
            vendor="amd",
            model=model,
            pci=known.get("pci", ""),
            memory_bytes=known.get("memory_bytes"),
            peaks=profile.peaks() if profile else {},
            driver=known.get("driver", ""),
            simulated=self._simulated,
        )
        card = _Card(info, handle)
        if handle.partition:
            card.refused = dict.fromkeys((row for row in self._door.rows if row.socket), "partition")
        return card

    def _read_card(self, card: _Card, group: str) -> list[Reading]:
        assert self._door is not None
        readings: list[Reading] = []
        card.handle.begin()
        for row in self._door.rows:
            if row.group == group and row not in card.refused and not card.lost:
                readings += self._ask(card, row)
        if card.lost:
            return []
        self._watch(card, readings)
        return readings + clock_below_maximum(card, readings)

    def _ask(self, card: _Card, row: Row) -> list[Reading]:
        assert self._door is not None
        try:
            values = list(row.read(card.handle))
        except Exception as error:
            # Bindings of many versions raise what they like; each kind is counted under its name, none hidden.
            self._failed(card, row, *self._door.judge(card.handle, error))
            return []
        for metric, value, _ in values:
            if value is not None:
                card.given.add(metric)
            elif metric not in card.given:
                card.silent[metric] = card.silent.get(metric, 0) + 1
        return [self._reading(card, metric, value, labels) for metric, value, labels in values if value is not None]

    def _failed(self, card: _Card, row: Row, meaning: str, detail: str) -> None:
        if meaning == "never":
            card.refused[row] = detail
        elif meaning == "lost":
            self._lose(card, f"error {detail}", detail)
        elif meaning == "error":
            self._count_error(card, row.metrics[0], detail)

    def _watch(self, card: _Card, readings: Sequence[Reading]) -> None:
        """Keep the highest clock, and report memory errors that could not be corrected."""
        for reading in readings:
            if reading.metric == "gpu.clock.sm.max":
                card.max_clock = reading.value
            elif reading.metric == "hw.errors" and reading.labels.get("error.type") == "uncorrected":
                before, card.uncorrected = card.uncorrected, reading.value
                if before is not None and reading.value > before:
                    text = f"{card.info.name}: {reading.value - before:g} memory errors that cannot be corrected"
                    self._report("gpu.ras", text, card.info.name, {"count": reading.value})

    def _missing(self, card: _Card) -> Mapping[str, str]:
        silent = {metric: "no_value" for metric, count in card.silent.items() if count >= _SILENT_AFTER}
        refused = {metric: reason for row, reason in card.refused.items() for metric in row.metrics}
        return {metric: reason for metric, reason in (silent | refused).items() if metric not in card.given}

    def _try_again(self, card: _Card) -> None:
        assert self._door is not None
        card.lost = not self._door.alive(card.handle)
