"""Tells once what begins to hold a run back, and once that it is over: to the log, to a file, to a webhook.

A finding is told when two evaluations in a row hold it, one that stopped the run at once; it is over when its last
step is known or five evaluations in a row lack it. What was told stands in the data folder, so that a server that
starts again does not repeat itself.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lens.store.lines import add_line

logger = logging.getLogger(__name__)

FILE = "alerts.ndjson"
SURE, GONE = 2, 5
"""So many evaluations in a row must hold a finding, or lack it."""
FORGOTTEN = 1000
"""After so many evaluations in a row that lack it, a finding that comes again is a new one."""
MOST_KEPT = 10_000
"""Messages of the past that a server reads when it starts."""
SEVERITIES = ("warning", "error")


@dataclass(frozen=True)
class Alert:
    """One message: that something began (`firing`), is known better (`changed`) or is over (`resolved`)."""

    run: str
    state: str
    cause: str
    ranks: tuple[int, ...]
    severity: str
    onset_step: int | None
    detected_step: int | None
    resolved_step: int | None
    component: str | None
    confidence: float
    text: str
    """For people: what, where, since when, and what to do."""


@dataclass
class _Finding:
    """Something that holds a run back, over the evaluations that hold it and those that lack it."""

    best: Mapping[str, Any]
    seen: int = 0
    missed: int = 0
    told: Alert | None = None

    def held(self, best: Mapping[str, Any]) -> None:
        self.best, self.seen, self.missed = best, self.seen + 1, 0

    def lacked(self) -> None:
        self.seen, self.missed = 0, self.missed + 1

    @property
    def state(self) -> str | None:
        """What it is in for certain; None where the next evaluations have to show it."""
        if self.missed:
            return "resolved" if self.missed >= GONE else None
        if self.seen < SURE and self.best["severity"] != "error":
            return None
        return "firing" if self.best["end_step"] is None else "resolved"

    def message(self, run: str) -> Alert | None:
        """What there is to tell; it counts as told from now on."""
        state, best, told = self.state, self.best, self.told
        if state is None or (told is None and self.missed):
            return None
        if told is not None and _end(told) == state:
            if state == "resolved" or (told.cause, told.severity) == (best["cause"], best["severity"]):
                return None
            state = "changed"
        self.told = _message(run, state, best)
        return self.told


def _end(told: Alert) -> str:
    return "resolved" if told.state == "resolved" else "firing"


@dataclass
class Watch:
    """What was told of one run. Pure: evaluations in, messages out."""

    run: str
    findings: list[_Finding] = field(default_factory=list)

    def update(self, diagnosis: Mapping[str, Any]) -> list[Alert]:
        """The messages that an evaluation of the run gives rise to."""
        lacking = list(self.findings)
        for best in _best(diagnosis):
            finding = next((known for known in lacking if _same(known.best, best)), None)
            if finding is None:
                self.findings.append(finding := _Finding(best))
            else:
                lacking.remove(finding)
            finding.held(best)
        for finding in lacking:
            finding.lacked()
        messages = [message for finding in self.findings if (message := finding.message(self.run)) is not None]
        self.findings = [each for each in self.findings if each.missed < (FORGOTTEN if each.told else 1)]
        return messages

    def remember(self, told: Alert) -> None:
        """Take over what was told before this process began."""
        best = {**asdict(told), "ranks": list(told.ranks), "end_step": told.resolved_step}
        self.findings = [finding for finding in self.findings if not _same(finding.best, best)]
        self.findings.append(_Finding(best, told=told))


def _best(diagnosis: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The likeliest explanation of each finding that is worth a message."""
    first: dict[int, Mapping[str, Any]] = {}
    for hypothesis in diagnosis["hypotheses"]:
        first.setdefault(hypothesis["finding"], hypothesis)
    return [best for best in first.values() if best["severity"] in SEVERITIES]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two hypotheses explain one thing: on the same ranks, and the same cause or the same onset."""
    return sorted(one["ranks"]) == sorted(other["ranks"]) and (
        one["cause"] == other["cause"] or one["onset_step"] == other["onset_step"]
    )


def _message(run: str, state: str, best: Mapping[str, Any]) -> Alert:
    ranks = tuple(best["ranks"])
    where = f" of rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else ""
    since = "" if best["onset_step"] is None else f" since step {best['onset_step']}"
    end = "" if best["end_step"] is None else f" until step {best['end_step']}"
    what = f"{best['cause'].replace('_', ' ')}{where}{since}{end}"
    text = f"{what} is over." if state == "resolved" else f"{what}. {best['recommendation']}"
    return Alert(
        run, state, best["cause"], ranks, best["severity"], best["onset_step"], best["detected_step"],
        best["end_step"], best["component"], best["confidence"],
        f"{run}: {text}",
    )  # fmt: skip


class Alerts:
    """What was told of every run, in the data folder, and who is told. Used by one thread."""

    def __init__(
        self, folder: Path, tell: Iterable[Callable[[Alert], None]] = (), runs: Collection[str] | None = None
    ) -> None:
        """`runs`: those that there are; what was told of others is cut out of the file."""
        self._path, self._tell = folder / FILE, (_log, *tell)
        self._runs: dict[str, Watch] = {}
        for told in _read(self._path, runs):
            self._watch(told.run).remember(told)

    def update(self, run: str, diagnosis: Mapping[str, Any]) -> None:
        """Tell what an evaluation of a run brings."""
        for alert in self._watch(run).update(diagnosis):
            self._keep(alert)
            for tell in self._tell:
                tell(alert)

    def _watch(self, run: str) -> Watch:
        return self._runs.setdefault(run, Watch(run))

    def _keep(self, alert: Alert) -> None:
        try:
            add_line(self._path, asdict(alert))
        except OSError as error:
            logger.warning("an alert was told but could not be kept in %s: %s", self._path, error)


def _log(alert: Alert) -> None:
    logger.log(logging.INFO if alert.state == "resolved" else logging.WARNING, "%s", alert.text)


def _read(path: Path, runs: Collection[str] | None) -> list[Alert]:
    """The messages kept; a line that cannot be read (the disk was full) is passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("alerts told before cannot be read: %s", error)
        return []
    known = set(Alert.__dataclass_fields__)
    found = []
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict) and set(message) == known:
            found.append(Alert(**{**message, "ranks": tuple(message["ranks"])}))
    kept = [alert for alert in found if runs is None or alert.run in runs][-MOST_KEPT:]
    if len(kept) < len(lines):
        _rewrite(path, kept)
    return kept


def _rewrite(path: Path, alerts: Iterable[Alert]) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        new.unlink(missing_ok=True)
        new.touch(0o600)
        for alert in alerts:
            add_line(new, asdict(alert))
        new.replace(path)
    except OSError as error:
        logger.warning("alerts of the past could not be cut out of %s: %s", path, error)
