"""One thing is one finding: what the same cause does to the same ranks, and what is only a small part of another finding.

A throttled process computes and transfers more slowly, and what comes and goes is found each time: each of these is
found by itself and priced by itself, and together they are what the cause costs.
"""

from __future__ import annotations

import numpy as np

from lens.diagnosis import policy, report
from lens.diagnosis.arrays import Ints
from lens.diagnosis.examine import Examiner
from lens.diagnosis.report import Hypothesis

SMALL_PART = 1 / 3
"""A finding that costs less than this share of another on the same ranks, and too little to be named, is part of it."""

Rivals = list[Hypothesis]


def told_once(examiner: Examiner, found: list[Rivals], index: int) -> list[Rivals]:
    """Findings (each its rivals, best first) without repetition, as of a step place."""
    kept: list[Rivals] = []
    for rivals in report.by_weight(found):
        best = rivals[0]
        same = next((i for i, other in enumerate(kept) if _same(other[0], best)), None)
        if same is not None:
            kept[same] = [_joined(examiner, kept[same][0], best, index), *kept[same][1:]]
        elif not any(_part_of(examiner, best, other[0], index) for other in kept):
            kept.append(rivals)
    return kept


def _same(one: Hypothesis, other: Hypothesis) -> bool:
    return bool(one["ranks"]) and all(one[key] == other[key] for key in ("cause", "ranks", "severity"))


def _part_of(examiner: Examiner, small: Hypothesis, main: Hypothesis, index: int) -> bool:
    costs = small["slowdown_pct"], main["slowdown_pct"]
    if None in costs or costs[0] >= min(100 * policy.SMALLEST_EFFECT, SMALL_PART * costs[1]):
        return False
    if not set(small["ranks"]) & set(main["ranks"]):
        return False
    windows = _window(examiner, small, index), _window(examiner, main, index)
    return len(np.intersect1d(*windows)) >= 0.5 * min(map(len, windows))


def _window(examiner: Examiner, item: Hypothesis, index: int) -> Ints:
    """Places of the steps that a hypothesis is about."""
    steps = examiner.timeline.steps
    first = 0 if item["onset_step"] is None else int(np.searchsorted(steps, item["onset_step"]))
    last = index if item["end_step"] is None else int(np.searchsorted(steps, item["end_step"]))
    return np.arange(first, max(first, last) + 1)


def _joined(examiner: Examiner, main: Hypothesis, more: Hypothesis, index: int) -> Hypothesis:
    """The main finding with what the other adds to its time, cost and evidence."""
    onsets = [item["onset_step"] for item in (main, more) if item["onset_step"] is not None]
    ends = [item["end_step"] for item in (main, more)]
    metrics = {item["metric"] for item in main["evidence"]}
    result = {
        **main,
        "onset_step": min(onsets, default=None),
        "end_step": None if None in ends else max(ends),
        "evidence": main["evidence"] + [item for item in more["evidence"] if item["metric"] not in metrics],
    }
    after = _window(examiner, result, index)
    now = examiner.step_seconds(after)
    if now is None or main["lost_seconds_per_step"] is None or more["lost_seconds_per_step"] is None:
        return result
    whole = sum(item["lost_seconds_per_step"] * len(_window(examiner, item, index)) for item in (main, more))
    lost = min(whole / len(after), 0.99 * now)
    ratio = now / (now - lost)
    share = f"{report.milliseconds(lost)} a step ({100 * (ratio - 1):.0f} %)"
    return {
        **result,
        "slowdown_pct": report.rounded(100 * (ratio - 1), 2),
        "lost_seconds_per_step": report.rounded(lost, 6),
        "lost_device_hours": report.rounded(report.device_hours(lost, len(after), examiner), 6),
        "what_if": {
            "step_seconds_now": report.rounded(now, 6),
            "step_seconds_if_fixed": report.rounded(now - lost, 6),
        },
        "recommendation": f"{main['recommendation']} In all, this cause takes {share}.",
    }
