"""What collectors of cards share, whoever makes the card: the round of reading, losing a card and finding it again.

A metric that a card does not give is asked for once, then left out and named in `lens.collector.supported` with the
reason; a card that fell off the bus marks only itself failed.
"""

from __future__ import annotations

import contextlib
import queue
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lens.collectors.protocol import Collector, CollectorEvent, DeviceInfo, Group, Reading

STATES = ("ok", "degraded", "failed")
_BUSY = 0.5
"""Utilisation below which a low clock is rest, not throttling."""


@dataclass
class Card:
    """One card that is read. `handle` is what its library calls it."""

    info: DeviceInfo
    handle: Any
    max_clock: float | None = None
    errors: dict[tuple[str, str], int] = field(default_factory=dict)
    """Failed readings by (metric, code)."""
    lost: bool = False

    @property
    def labels(self) -> Mapping[str, str]:
        """Labels of every reading of this card."""
        return {"simulated": "true"} if self.info.simulated else {}


AnyCard = TypeVar("AnyCard", bound=Card)


class CardCollector(Collector, Generic[AnyCard]):
    """Reads every card of a host, one after the other.

    Args:
        host: the host's name; card i is called ``host/gpu<i>``.
        simulated: whether what lies beneath is a simulation; then every reading says so.
    """

    def __init__(self, host: str, simulated: bool = False) -> None:
        self._host = host
        self._simulated = simulated
        self._cards: list[AnyCard] = []
        self._t_ns = 0
        self._events: queue.SimpleQueue[CollectorEvent] = queue.SimpleQueue()

    def devices(self) -> Sequence[DeviceInfo]:
        """The cards found."""
        return [card.info for card in self._cards]

    def groups(self) -> Sequence[Group]:
        """Fast for what moves with each step, slow for health and limits."""
        return [Group("fast", 1.0), Group("slow", 15.0)]

    def read(self, group: str) -> Sequence[Reading]:
        """One reading of every card; a lost card gives its state and nothing else."""
        readings: list[Reading] = []
        for card in self._cards:
            # One time for all of a card's readings: they are read within a millisecond and stored as one row.
            self._t_ns = time.monotonic_ns()
            if group == "slow" and card.lost:
                self._try_again(card)
            if not card.lost:
                readings += self._read_card(card, group)
            if group == "slow" or card.lost:
                readings += self._state(card)
        return readings

    @abstractmethod
    def _read_card(self, card: AnyCard, group: str) -> list[Reading]:
        """The readings of one card; none when it was lost while being read."""

    @abstractmethod
    def _try_again(self, card: AnyCard) -> None:
        """Clear `lost` if the card answers again."""

    @abstractmethod
    def _missing(self, card: AnyCard) -> Mapping[str, str]:
        """Why, by metric, this card does not give it."""

    def _reading(self, card: AnyCard, metric: str, value: float, labels: Mapping[str, str]) -> Reading:
        return Reading(metric, value, self._t_ns, {**labels, **card.labels}, device=card.info.name)

    def _state(self, card: AnyCard) -> list[Reading]:
        """1 for the state the card is in, 0 for the others; which metrics it does not give, and failed readings."""
        now = "failed" if card.lost else "ok"
        found = [self._reading(card, "hw.status", float(state == now), {"hw.state": state}) for state in STATES]
        for metric, reason in self._missing(card).items():
            labels = {"backend": self.backend, "metric": metric, "reason": reason}
            found.append(self._reading(card, "lens.collector.supported", 0.0, labels))
        for (metric, code), count in card.errors.items():
            labels = {"backend": self.backend, "metric": metric, "code": code}
            found.append(self._reading(card, "lens.collector.errors", float(count), labels))
        return found

    def _count_error(self, card: AnyCard, metric: str, code: str) -> None:
        card.errors[metric, code] = card.errors.get((metric, code), 0) + 1

    def _lose(self, card: AnyCard, error: str, code: object) -> None:
        """Mark a card lost and report it, once."""
        if card.lost:
            return
        card.lost = True
        text = f"{card.info.name} ({card.info.model}) does not answer any more ({error})"
        self._report("gpu.lost", text, card.info.name, {"code": code})

    def _report(self, kind: str, text: str, device: str | None, attrs: Mapping[str, Any]) -> None:
        self._events.put(CollectorEvent(kind, "error", text, time.monotonic_ns(), device, attrs))

    def _reported(self, timeout_s: float = 0.0) -> list[CollectorEvent]:
        """What was reported since the last call; waits for the first."""
        found: list[CollectorEvent] = []
        with contextlib.suppress(queue.Empty):
            if timeout_s > 0:
                found.append(self._events.get(timeout=timeout_s))
            while True:
                found.append(self._events.get_nowait())
        return found


def clock_below_maximum(card: Card, readings: Sequence[Reading]) -> list[Reading]:
    """The clock by its maximum, only while the card is busy: an idle card's low clock is no throttling."""
    found = {reading.metric: reading for reading in readings}
    clock, busy = found.get("gpu.clock.sm"), found.get("hw.gpu.utilization")
    if clock is None or busy is None or not card.max_clock or busy.value < _BUSY:
        return []
    ratio = clock.value / card.max_clock
    return [Reading("gpu.throttle.below_max.ratio", ratio, clock.t_ns, card.labels, card.info.name)]
