"""From noticed causes to hypotheses of the reply."""

from __future__ import annotations

from typing import Any

import numpy as np

from lens.diagnosis import report
from lens.diagnosis.examine import Examiner
from lens.diagnosis.judge import CAUSES
from lens.diagnosis.notices import Evidence, Notice
from lens.diagnosis.report import Hypothesis


def of_notice(examiner: Examiner, notice: Notice, index: int) -> list[Hypothesis]:
    """One hypothesis; what a family sees has no rivals of its own."""
    steps, cause = examiner.timeline.steps, CAUSES[notice.cause]
    ranks = [int(examiner.topology.ranks[row]) for row in notice.rows]
    end = index if notice.last is None else notice.last
    after = np.arange(notice.onset, max(end, notice.onset) + 1)
    timed = notice.onset >= 0
    now = examiner.step_seconds(after) if timed else None
    fixed = now / notice.ratio if now is not None and notice.ratio else None
    lost = now - fixed if now is not None and fixed is not None else None
    component = notice.component or (examiner.topology.component(ranks) if ranks else None)
    onset = int(steps[notice.onset]) if timed else None
    slower = notice.ratio or notice.requests
    words = {
        "ranks": report.named(ranks), "component": component or report.named(ranks), "onset": onset,
        "s": "s" if len(ranks) == 1 else "",
    }  # fmt: skip
    said = notice.said.format(**words)
    said = said[0].upper() + said[1:]
    if lost is not None and notice.ratio is not None and notice.ratio > 1:
        said += f", which costs every rank {report.milliseconds(lost)} a step ({100 * (notice.ratio - 1):.0f} %)"
    return [
        report.hypothesis(
            notice.cause, ranks,
            severity=cause.severity, component=component, confidence=report.probability(notice.confidence),
            onset_step=onset, end_step=None if notice.last is None or not timed else int(steps[notice.last]),
            slowdown_pct=report.rounded(100 * (slower - 1), 2) if slower else None,
            lost_seconds_per_step=report.rounded(lost, 6),
            lost_device_hours=report.rounded(report.device_hours(lost, len(after), examiner), 6),
            evidence=[_shown(item, ranks) for item in notice.evidence],
            against=[{"cause": rival, "because": because} for rival, because in notice.rivals],
            recommendation=f"{said}. {cause.advice.format(**words)}",
            what_if={"step_seconds_now": report.rounded(now, 6), "step_seconds_if_fixed": report.rounded(fixed, 6)},
        )
    ]  # fmt: skip


def _shown(item: Evidence, ranks: list[int]) -> dict[str, Any]:
    observed = item.observed
    number = observed if isinstance(observed, float) else None
    effect = number / item.baseline - 1 if number is not None and item.baseline else None
    return {
        "metric": item.metric, "ranks": ranks, "baseline": report.rounded(item.baseline, 6),
        "observed": report.rounded(number, 6) if number is not None else observed,
        "effect": report.rounded(effect, 4),
    }  # fmt: skip
