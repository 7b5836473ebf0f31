"""What a Prometheus scrapes: the newest value of every series of the runs that are live, and the server's own health."""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from lens import catalogue
from lens.store.folder import DataFolder
from lens.store.live import LiveFeed
from lens.store.projects import run_of, those_of
from lens.store.query import Query
from lens.store.rows import Series
from lens.store.runs import Run

MOST_SERIES = 200_000
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TYPES = {"counter": "counter"}
"""Prometheus' type of a metric of the catalogue; the others are gauges: a histogram's samples are single values."""
_Sample = tuple[dict[str, Any], float]


def exposition(
    folder: DataFolder, query: Query, live: LiveFeed, run: str | None = None, project: str | None = None
) -> str:
    """The text. Of `run`, or of every run that is live; of one project's runs alone if that is named."""
    known = those_of(folder.registry.runs(), project)
    runs = [run_of(folder.registry, run, project)] if run else [each for each in known if _is_live(folder, each)]
    parts = [*_progress(folder, live, runs), *_latest(folder, query, runs), *_health(folder, len(runs))]
    return "\n".join(parts) + "\n"


def _family(name: str, kind: str, about: str, samples: Iterable[_Sample]) -> Iterator[str]:
    lines = [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    if lines:
        yield f"# HELP {name} {about}"
        yield f"# TYPE {name} {kind}"
        yield from lines


def _health(folder: DataFolder, live: int) -> Iterator[str]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    applier, log = folder.applier, folder.log
    batches = sum(folder.registry.progress(run.number).batches for run in folder.registry.runs())
    rejected = sum(folder.registry.progress(run.number).rejected for run in folder.registry.runs())
    for name, kind, about, value in (
        ("lens_server_healthy", "gauge", "1 while the database takes records", float(applier.failure is None)),
        ("lens_server_runs_live", "gauge", "Runs that records come for", live),
        ("lens_server_batches_total", "counter", "Batches taken", batches),
        ("lens_server_records_rejected_total", "counter", "Records refused", rejected),
        ("lens_server_log_bytes", "gauge", "Bytes of the log on disk", log.end - log.start),
        ("lens_server_log_behind_bytes", "gauge", "Bytes acknowledged and not in the database yet", log.end - applier.applied),
        ("lens_server_waiting_bytes", "gauge", "Memory of what waits for the database, about", applier.pending_bytes),
        ("lens_server_cpu_seconds_total", "counter", "Processor time used", usage.ru_utime + usage.ru_stime),
        ("lens_server_memory_peak_bytes", "gauge", "Most resident memory so far", memory),
    ):  # fmt: skip
        yield from _family(name, kind, about, [({}, value)])


def _progress(folder: DataFolder, live: LiveFeed, runs: list[Run]) -> Iterator[str]:
    rows = [(run, folder.registry.progress(run.number)) for run in runs]
    steps = [({"run": run.id}, p.last_step) for run, p in rows if p.last_step is not None]
    yield from _family("lens_run_last_step", "gauge", "Newest step that any rank has finished", steps)
    ages = [({"run": run.id}, age) for run, p in rows if (age := p.age_s()) is not None]
    yield from _family("lens_run_age_seconds", "gauge", "Time since the newest records came", ages)
    reporting = [({"run": run.id}, p.ranks_reporting()) for run, p in rows]
    yield from _family("lens_run_ranks_reporting", "gauge", "Ranks heard of lately", reporting)
    world = [({"run": run.id}, run.world_size) for run in runs if run.world_size is not None]
    yield from _family("lens_run_world_size", "gauge", "Ranks there should be", world)
    verdicts = [(run, verdict) for run in runs if (verdict := live.diagnosis(run.id)) is not None]
    status = [({"run": run.id, "status": verdict["status"]}, 1) for run, verdict in verdicts]
    yield from _family("lens_run_status", "gauge", "1 for the status that the newest verdict gives", status)
    yield from _family(
        "lens_run_finding", "gauge", "1 for every finding that has not ended: alert on this",
        [
            ({"run": run.id, "cause": each["cause"], "severity": each["severity"],
              "ranks": ",".join(map(str, each["ranks"]))}, 1)
            for run, verdict in verdicts for each in _first_of_each_finding(verdict) if each.get("end_step") is None
        ],
    )  # fmt: skip


def _first_of_each_finding(verdict: dict[str, Any]) -> Iterable[dict[str, Any]]:
    best: dict[Any, dict[str, Any]] = {}
    for hypothesis in verdict.get("hypotheses", ()):
        best.setdefault(hypothesis["finding"], hypothesis)
    return best.values()


def _latest(folder: DataFolder, query: Query, runs: list[Run]) -> Iterator[str]:
    series = {(run.number, each.mid): (run, each) for run in runs for each in folder.registry.series(run.number)}
    if not series:
        return
    families: dict[str, list[_Sample]] = {}
    for number, mid, rank, value in query.newest([run.number for run in runs], MOST_SERIES):
        known = series.get((number, mid))
        # What was scraped from a lens and written back is not told again: it would come back as yet another series.
        if known is not None and not known[1].metric.startswith("lens_"):
            run, each = known
            families.setdefault(each.metric, []).append((_named(run, each, rank), value))
    names: dict[str, list[_Sample]] = {}
    about: dict[str, tuple[str, str]] = {}
    for metric in sorted(families):
        known_metric = catalogue.get(metric)
        name = catalogue.prometheus_name(known_metric) if known_metric else _user_name(metric)
        kind = _TYPES.get(known_metric.kind, "gauge") if known_metric else "untyped"
        about.setdefault(name, (kind, known_metric.help if known_metric else f"The user's own metric {metric}"))
        names.setdefault(name, []).extend(families[metric])
    for name, samples in names.items():
        yield from _family(name, about[name][0], _escaped(about[name][1], quotes=False), samples)


def _named(run: Run, series: Series, rank: int) -> dict[str, Any]:
    own = json.loads(series.labels) if series.labels else {}
    whose = {"run": run.id, "host": series.host, "device": series.device, "rank": None if rank < 0 else rank}
    theirs = {f"exported_{name}" if name in whose else name: value for name, value in own.items()}
    return {**theirs, **{key: value for key, value in whose.items() if value is not None}}


def _user_name(metric: str) -> str:
    name = re.sub(r"[^a-zA-Z0-9_]", "_", metric)
    return name if name.startswith("lens_") else f"lens_{name}"


def _labels(labels: dict[str, Any]) -> str:
    seen = {re.sub(r"[^a-zA-Z0-9_]", "_", name) or "_": str(value) for name, value in labels.items()}
    named = ((f"_{name}" if name[0].isdigit() else name, value) for name, value in seen.items())
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(named))
    return f"{{{inside}}}" if inside else ""


def _escaped(text: str, quotes: bool = True) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value)) if not float(value).is_integer() or abs(value) > 1e15 else str(int(value))


def _is_live(folder: DataFolder, run: Run) -> bool:
    return folder.registry.progress(run.number).state() == "live"
