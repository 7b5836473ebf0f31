"""`diagnose`: the one door of the engine. Selects, examines, looks for fatal ends, and writes the reply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lens.diagnosis import (
    attribution,
    exits,
    hang_report,
    hangs,
    link_report,
    notice_report,
    numerics,
    policy,
    queues,
    report,
    requests,
    told_once,
)
from lens.diagnosis.dating import by_attempt, date
from lens.diagnosis.examine import Examiner
from lens.diagnosis.exits import End
from lens.diagnosis.judge import Judge
from lens.diagnosis.report import Hypothesis
from lens.diagnosis.select import Timeline, through
from lens.diagnosis.topology import Topology, reporting_ranks
from lens.tables import Tables

WANTED_METRICS = (
    "gpu.clock.sm", "gpu.throttle.reasons", "hw.temperature", "hw.power", "process.cpu.run_delay",
    "process.cpu.time", "train.loss.local", "train.grad_norm.local",
)  # fmt: skip


def diagnose(run: Mapping[str, Any], tables: Tables, upto_step: int | None = None) -> dict[str, Any]:
    """Say what holds a run back, as the frozen reply of the diagnosis route.

    run: the run object as posted ({} derives what it can from the records). tables: its records, in any order.
    upto_step: judge as of this step; None judges all. Pure: the same records give the same reply.
    """
    timeline = Timeline.of(tables)
    seen = through(tables, timeline, upto_step)
    if seen is not tables:
        timeline = Timeline.of(seen)
    topology = Topology.of(run, seen)
    examiner = Examiner.of(seen, timeline, topology)
    index = len(timeline) - 1
    judge = Judge(examiner)
    verdicts, noticed = judge.at(index)
    found = [report.of_verdict(examiner, verdict) for verdict in verdicts]
    found += [notice_report.of_notice(examiner, notice, index) for notice in noticed]
    found += [link_report.of_link(examiner, link) for link in judge.links(index)]
    found = [[attribution.attributed(examiner, item, index) for item in rivals] for rivals in found]
    hypotheses = report.ordered(_fatal(examiner, index) + told_once.told_once(examiner, found, index))
    date(judge, hypotheses, index)
    last = int(timeline.steps[-1]) if len(timeline) else None
    reached = upto_step if last is None else last if upto_step is None else min(upto_step, last)
    return {
        "run": run.get("run"),
        "upto_step": reached,
        "status": _status(examiner, hypotheses, index),
        "hypotheses": hypotheses,
        "coverage": _coverage(examiner),
    }


def _fatal(examiner: Examiner, index: int) -> list[list[Hypothesis]]:
    """What ended or stopped the run."""
    ended = exits.ends(examiner.tables, examiner.timeline, index)
    hang = hangs.find(examiner.tables, examiner.topology, examiner.frame.duration, ended)
    found = [_end(examiner, end, victims, hang is not None) for end, victims in by_attempt(ended)]
    known_dead = {end.rank for end in ended}
    if hang is not None and not (hang.cause == "rank_dead" and set(hang.ranks) & known_dead):
        found.append(hang_report.of_hang(examiner, hang))
    origin = numerics.origin(examiner.tables, examiner.timeline, examiner.topology, index)
    if origin is not None:
        found.append(report.of_origin(examiner, origin))
    return found


def _end(examiner: Examiner, end: End, victims: list[End], hung: bool) -> list[Hypothesis]:
    """A process that ended with an error; before it, the rank whose other call ended it."""
    told = report.of_end(examiner, end, victims, hung)
    if end.restarted or end.memory or end.worker:
        return told
    ended = {end.rank, *(victim.rank for victim in victims)}
    parted = hangs.parted(examiner.tables, examiner.topology, end, ended)
    if parted is None:
        return told
    return [*hang_report.of_hang(examiner, parted), {**told[0], "confidence": round(1 - told[0]["confidence"], 3)}]


def _status(examiner: Examiner, hypotheses: list[Hypothesis], index: int) -> str:
    errors = {item["cause"] for item in hypotheses if item["severity"] == "error"}
    hung = any(item["severity"] == "error" and item["evidence"][0]["metric"] == "heartbeat" for item in hypotheses)
    if errors and not (hung and len(errors) == 1):
        return "failed"
    if hung:
        return "hung"
    if any(item["severity"] == "warning" for item in hypotheses):
        return "degraded"
    enough = (
        examiner.finished_steps(index) >= policy.ENOUGH_STEPS or requests.count(examiner.tables) >= queues.FEWEST
    )
    return "healthy" if enough else "insufficient"


def _coverage(examiner: Examiner) -> dict[str, Any]:
    tables = examiner.tables
    wanted = {metric: tables.code(metric) in tables.samples["metric"] for metric in WANTED_METRICS}
    wanted["collective"] = bool(len(examiner.frame.collectives)) or bool(examiner.frame.wait)
    wanted["phase"] = bool(examiner.frame.phase)
    wanted["step"] = examiner.finished_steps(len(examiner.timeline) - 1) > 0
    wanted.update({f"run.{name}": False for name in examiner.topology.derived})
    return {
        "ranks_reporting": len(reporting_ranks(tables)),
        "world_size": examiner.topology.world_size,
        "signals_missing": sorted(name for name, present in wanted.items() if not present),
    }
