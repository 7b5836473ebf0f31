"""Points of other systems as lens's samples: whose they are, what they are called, and which run they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lens.records import word

_RUN_KEYS: tuple[str, ...] = ("lens.run", "lens_run")
_RANK_KEYS: tuple[str, ...] = ("lens.rank", "lens_rank", "rank")
_STEP_KEYS: tuple[str, ...] = ("lens.step", "lens_step", "step")
_HOST_KEYS: tuple[str, ...] = ("host.name", "host_name", "host", "instance")
_DEVICE_KEYS: tuple[str, ...] = ("lens.device", "lens_device", "device")
_LONGEST_NAME, _LONGEST_RUN = 128, 128


@dataclass
class Gathered:
    """Samples by run, and how many points were refused, with the first reason."""

    lines: dict[str, list[bytes]] = field(default_factory=dict)
    refused: int = 0
    reason: str = ""

    def refuse(self, reason: str, points: int = 1) -> None:
        """Note points that are not taken."""
        self.refused += points
        self.reason = self.reason or reason

    def add(self, run: str, metric: str, t_ns: int, value: float, attributes: Mapping[str, str]) -> None:
        """Take one point; what its attributes say of rank, host, device and step is the sample's own."""
        labels = dict(attributes)
        record: dict[str, Any] = {
            "type": "sample",
            "t_ns": t_ns,
            "metric": metric_name(metric),
            "value": word(value),
        }
        for key, names in (("rank", _RANK_KEYS), ("step", _STEP_KEYS)):
            number = _whole(_taken(labels, names))
            if number is not None:
                record[key] = number
        for key, names in (("host", _HOST_KEYS), ("device", _DEVICE_KEYS)):
            text = _taken(labels, names)
            if text:
                record[key] = text
        for name in _RUN_KEYS:
            labels.pop(name, None)
        if labels:
            record["labels"] = labels
        self.lines.setdefault(run_id(run), []).append(msgspec.json.encode(record))


def named_run(attributes: Mapping[str, str], asked: str | None, otherwise: Iterable[str | None]) -> str:
    """The run that a point belongs to: what its attributes say, what the request says, or the first name known."""
    for name in _RUN_KEYS:
        if attributes.get(name):
            return attributes[name]
    return next((each for each in (asked, *otherwise) if each), "metrics")


def metric_name(name: str) -> str:
    """The name with what lens has no room for replaced."""
    cleaned = re.sub(r"[^a-zA-Z0-9_./-]", ".", name)[:_LONGEST_NAME] or "_"
    return cleaned if re.match(r"[a-zA-Z_]", cleaned) else f"_{cleaned}"[:_LONGEST_NAME]


def run_id(name: str) -> str:
    """The name as a run's id."""
    cleaned = re.sub(r"[\x00-\x1f\x7f/\\?#%]", "_", name)[:_LONGEST_RUN]
    return cleaned if cleaned not in (".", "..") else "_"


def _taken(labels: dict[str, str], names: Iterable[str]) -> str | None:
    """The first of these labels there is; it goes from the labels."""
    for name in names:
        if name in labels:
            return labels.pop(name)
    return None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,9}", text) else None
