"""From judged findings to the frozen reply: numbers, evidence, what speaks against the rivals, and advice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from lens.diagnosis.examine import Examiner
from lens.diagnosis.exits import End
from lens.diagnosis.findings import Verdict
from lens.diagnosis.numerics import Origin
from lens.diagnosis.scenes import Measure
from lens.diagnosis.signatures import UNEXPLAINED_ADVICE, UNMOVED, Explained

SEVERITY_ORDER = {"error": 0, "warning": 1, "info": 2}
PRIMARY_METRIC = {"compute": "compute", "optimizer": "optimizer", "data": "data", "h2d": "h2d", "host": "host"}
MOST_AGAINST = 4

Hypothesis = dict[str, Any]


def hypothesis(cause: str, ranks: Iterable[int], **known: Any) -> Hypothesis:
    """A hypothesis with every key of the reply; what is not given is unknown (null) or empty."""
    result: Hypothesis = {
        "finding": 0, "cause": cause, "severity": "warning", "ranks": sorted(int(rank) for rank in ranks),
        "groups": [], "component": None, "confidence": 0.5, "onset_step": None, "detected_step": None,
        "end_step": None, "slowdown_pct": None, "lost_seconds_per_step": None, "lost_device_hours": None,
        "evidence": [], "against": [], "recommendation": "",
        "what_if": {"step_seconds_now": None, "step_seconds_if_fixed": None},
    }  # fmt: skip
    unknown = set(known) - set(result)
    if unknown:
        raise KeyError(f"not in the reply: {sorted(unknown)}")
    result.update(known)
    return result


def by_weight(found: list[list[Hypothesis]]) -> list[list[Hypothesis]]:
    """Findings (each its rivals, best first) in the order of the reply: fatal first, then confidence × lost time."""

    def weight(rivals: list[Hypothesis]) -> tuple[int, float, list[int], str]:
        best = rivals[0]
        lost = best["lost_seconds_per_step"]
        return (
            SEVERITY_ORDER[best["severity"]], -best["confidence"] * (1e-6 if lost is None else lost),
            best["ranks"], best["cause"],
        )  # fmt: skip

    return sorted(found, key=weight)


def ordered(found: list[list[Hypothesis]]) -> list[Hypothesis]:
    """All hypotheses as the reply lists them, each with the number of its finding."""
    return [{**item, "finding": number} for number, rivals in enumerate(by_weight(found)) for item in rivals]


def of_verdict(examiner: Examiner, verdict: Verdict) -> list[Hypothesis]:
    """The explanations of a slow rank, best first."""
    finding, steps = verdict.finding, examiner.timeline.steps
    ranks = [int(examiner.topology.ranks[row]) for row in finding.rows]
    ratio = verdict.ratio
    now = examiner.step_seconds(verdict.after)
    fixed = now / ratio if now is not None and ratio else None
    lost = now - fixed if now is not None and fixed is not None else None
    component = examiner.topology.component(ranks)
    result = []
    for place, explained in enumerate(verdict.listed):
        signature = explained.signature
        advice = signature.advice if signature else UNEXPLAINED_ADVICE
        result.append(
            hypothesis(
                explained.cause, ranks,
                severity=signature.severity if signature else "warning",
                component=component,
                confidence=probability(explained.probability * verdict.sure),
                onset_step=int(steps[verdict.after[0]]) if not finding.standing else int(steps[0]),
                end_step=None if finding.last is None else int(steps[finding.last]),
                slowdown_pct=rounded(100 * (ratio - 1), 2) if ratio else None,
                lost_seconds_per_step=rounded(lost, 6),
                lost_device_hours=rounded(device_hours(lost, len(verdict.after), examiner), 6),
                evidence=_evidence(verdict, explained, ranks),
                against=_against(verdict, explained) if place == 0 else [],
                recommendation=_sentence(examiner, verdict, explained, ranks, component, lost, ratio)
                + advice.format(component=component or named(ranks), ranks=named(ranks)),
                what_if={"step_seconds_now": rounded(now, 6), "step_seconds_if_fixed": rounded(fixed, 6)},
            )
        )  # fmt: skip
    return result


def of_end(examiner: Examiner, end: End, victims: list[End], hung: bool) -> list[Hypothesis]:
    """A process that ended with an error, and the ranks that ended because of it."""
    cause = "out_of_memory" if end.memory else "dataloader_worker_death" if end.worker else "rank_dead"
    others = sorted(v.rank for v in victims if v.rank != end.rank)
    component = examiner.topology.component([end.rank])
    against = []
    if others:
        against = [{
            "cause": "rank_dead",
            "because": f"{named(others)} ended {_ago(max(0, min(v.t_ns for v in victims) - end.t_ns) * 1e-9)} later, as a "
            f"consequence: {victims[0].manner}",
        }]  # fmt: skip
    step = _last_step_of(examiner, end.rank)
    where = f" on {component}" if component else ""
    during = f" after it finished step {step}" if step is not None else ""
    text = (
        f"Rank {end.rank}{where} was {end.manner}{during}"
        if end.signal is not None
        else (f"Rank {end.rank}{where} {end.manner}{during}")
    )
    advice = {
        "out_of_memory": "Lower its memory use (micro-batch, sequence length, activation checkpointing) or raise the limit.",
        "dataloader_worker_death": "Look at the loader worker's own log; shared memory and file handles are the usual reasons.",
        "rank_dead": "Read that process's log and its host's kernel log (memory killer, Xid errors), then restart from the "
        "last checkpoint.",
    }[cause]
    certainty = {3: 0.97, 2: 0.85, 1: 0.6, 0: 0.7}[end.strength]
    return [
        hypothesis(
            cause, [end.rank],
            severity="warning" if end.restarted else "error",
            component=component, confidence=certainty,
            onset_step=_step_after(examiner, step),
            end_step=int(examiner.timeline.steps[end.visible]) if end.restarted else None,
            evidence=[{
                "metric": "process.exit", "ranks": [end.rank], "baseline": None,
                "observed": end.exit_code if end.exit_code is not None else end.signal, "effect": None,
            }],
            against=against, recommendation=f"{text}{'; the other ranks wait for it' if hung else ''}. {advice}",
        )
    ]  # fmt: skip


def of_origin(examiner: Examiner, origin: Origin) -> list[Hypothesis]:
    """Where numbers stopped being finite."""
    ranks = [int(examiner.topology.ranks[row]) for row in origin.rows]
    component = examiner.topology.component(ranks) if ranks else None
    local = origin.metric.endswith(".local")
    steps = examiner.timeline.steps
    here = int(np.searchsorted(steps, origin.step))
    after = np.arange(min(here, len(steps) - 1), len(steps))
    now = examiner.step_seconds(after)
    title = {
        "train.loss.local": "local loss",
        "train.grad_norm.local": "local gradient norm",
        "train.loss": "loss",
    }.get(origin.metric, "gradient norm")
    if ranks:
        where = f"{named(ranks).capitalize()}{f' on {component}' if component else ''}"
        text = f"{where} had the first non-finite {title}, at step {origin.step}; every rank has it one reduction later. "
    else:
        text = f"The {title} is not finite from step {origin.step} on; which rank it came from was not recorded. "
    against = []
    if ranks and local and len(ranks) < origin.reporting:
        against = [{
            "cause": "loss_spike",
            "because": f"the {title} of the other {origin.reporting - len(ranks)} reporting ranks was finite at step "
            f"{origin.step}",
        }]  # fmt: skip
    certainty = (0.97 if len(ranks) == 1 else 0.7) if local and ranks else 0.75 if ranks else 0.5
    return [
        hypothesis(
            "nan_origin", ranks, severity="error", component=component, confidence=certainty, onset_step=origin.step,
            lost_device_hours=rounded(device_hours(now, len(after), examiner), 6),
            evidence=[{
                "metric": origin.metric, "ranks": ranks, "baseline": origin.last_finite, "observed": "NaN",
                "effect": None,
            }],
            against=against,
            recommendation=text + "Stop the run and go back to the last checkpoint before that step; check that rank's "
            "input batch and its device's memory errors, and log per-layer maxima.",
        )
    ]  # fmt: skip


def _evidence(verdict: Verdict, explained: Explained, ranks: list[int]) -> list[dict[str, Any]]:
    """The excess itself, then every measure that moved in this explanation's favour."""
    names = [PRIMARY_METRIC[verdict.finding.feature]]
    gains = sorted(explained.gains.items(), key=lambda item: (-item[1], item[0]))
    names += [name for name, gain in gains if gain > 0 and name not in names]
    result = []
    for name in names:
        measure = verdict.measures[name]
        baseline = measure.baseline
        if name == names[0]:
            baseline = _baseline_of(verdict, measure)
        result.append(evidence_of(replace(measure, baseline=baseline), ranks))
    return result


def evidence_of(measure: Measure, ranks: list[int]) -> dict[str, Any]:
    """A measure as evidence."""
    return {
        "metric": measure.metric, "ranks": ranks, "baseline": rounded(measure.baseline, 6),
        "observed": rounded(measure.observed, 6), "effect": rounded(measure.effect, 4),
    }  # fmt: skip


def _baseline_of(verdict: Verdict, measure: Measure) -> float | None:
    """Without a past of its own, what the rank should take is what it takes less the excess."""
    if measure.baseline is not None or measure.observed is None:
        return measure.baseline
    rows = list(verdict.finding.rows)
    return measure.observed - float(verdict.extra[:, rows].mean())


def _against(verdict: Verdict, best: Explained) -> list[dict[str, str]]:
    """For each look-alike that was weighed and lost: the measure that spoke most clearly against it."""
    result = []
    for rival in verdict.explained:
        if rival is best:
            continue
        if rival.signature is None:
            supports = [name for name, gain in best.gains.items() if gain >= 1]
            if supports:
                known = " and ".join(moved(verdict.measures[name]) for name in supports[:2])
                result.append({"cause": "unexplained", "because": f"the reason is known: {known}"})
            continue
        name, loss = min(rival.gains.items(), key=lambda item: (item[1], item[0]))
        if loss <= -0.5 and verdict.measures[name].level is not None:
            result.append({"cause": rival.cause, "because": moved(verdict.measures[name])})
    return result[:MOST_AGAINST]


def moved(measure: Measure) -> str:
    """What a measure did, in words: "SM clock fell from 1980 MHz to 1290 MHz"."""
    unit = f" {measure.unit}" if measure.unit else ""
    level = measure.level or 0.0
    if measure.observed is None:
        return f"{measure.title} is not known"
    if abs(level) <= UNMOVED:
        return f"{measure.title} did not change ({_number(measure.observed)}{unit})"
    verb = "rose" if level > 0 else "fell"
    if measure.baseline is None:
        return f"{measure.title} {verb} to {_number(measure.observed)}{unit}"
    return f"{measure.title} {verb} from {_number(measure.baseline)}{unit} to {_number(measure.observed)}{unit}"


def _sentence(
    examiner: Examiner,
    verdict: Verdict,
    explained: Explained,
    ranks: list[int],
    component: str | None,
    lost: float | None,
    ratio: float | None,
) -> str:
    """The verdict in one sentence: who, what, since when it costs what, and the strongest reason."""
    several = len(ranks) > 1
    part = {
        "compute": "compute" if several else "computes",
        "optimizer": "take in the optimizer" if several else "takes in the optimizer",
        "data": "wait for their own data" if several else "waits for its own data",
        "h2d": "copy to their cards" if several else "copies to its card",
        "host": "spend time between phases" if several else "spends time between phases",
    }
    where = f" ({component})" if component else ""
    extra = float(verdict.extra[:, list(verdict.finding.rows)].mean())
    text = (
        f"{named(ranks).capitalize()}{where} {part[verdict.finding.feature]} {milliseconds(extra)} longer per step"
    )
    peers = "their peers" if several else "its peers"
    text += f" than {peers}" if verdict.finding.standing else f" than before and than {peers}"
    if verdict.hidden is not None:
        behind, share = (
            examiner.topology.ranks[list(verdict.hidden.rows)].tolist(),
            100 * (verdict.hidden.ratio - 1),
        )
        text += f"; all wait for {named(behind)} anyhow, and once that is repaired, this costs {share:.0f} % of the step"
    elif lost is not None and ratio is not None:
        text += f", which costs every rank {milliseconds(lost)} a step ({100 * (ratio - 1):.0f} %)"
    reasons = [
        name for name, gain in sorted(explained.gains.items(), key=lambda item: (-item[1], item[0])) if gain >= 1
    ]
    if reasons:
        text += f"; {moved(verdict.measures[reasons[0]])}"
    elif explained.cause == "unexplained":
        text += "; clock, throttling and host signals do not explain it"
    return text + ". "


def device_hours(seconds: float | None, steps: int, examiner: Examiner) -> float | None:
    return None if seconds is None else seconds * steps * examiner.topology.world_size / 3600


def _last_step_of(examiner: Examiner, rank: int) -> int | None:
    row = int(examiner.topology.row(np.array([rank]))[0])
    if row < 0 or not len(examiner.timeline):
        return None
    finished = np.flatnonzero(np.isfinite(examiner.frame.duration[:, row]))
    return int(examiner.timeline.steps[finished[-1]]) if len(finished) else None


def _step_after(examiner: Examiner, step: int | None) -> int | None:
    """The step that a rank did not finish, when anyone began it."""
    if step is None:
        return None
    steps = examiner.timeline.steps
    return int(steps[min(int(np.searchsorted(steps, step)) + 1, len(steps) - 1)])


def named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) != 1 else ''} {listed(ranks)}" if ranks else "no rank"


def listed(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"{shown} and {len(ranks) - 8} more" if len(ranks) > 8 else shown


def sentence(text: str) -> str:
    """With a capital and a point."""
    return f"{text[:1].upper()}{text[1:]}."


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 10 else f"{value:.1f} ms"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ago(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def rounded(value: float | None, digits: int) -> float | None:
    """Numbers of the reply, short enough to read; not finite counts as unknown."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def probability(value: float) -> float:
    return round(float(np.clip(value, 0.01, 0.99)), 3)
