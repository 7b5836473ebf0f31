"""Why nothing moves, in the words and numbers of the reply."""

from __future__ import annotations

from lens.diagnosis.blame import Hang
from lens.diagnosis.examine import Examiner
from lens.diagnosis.report import Hypothesis, hypothesis, named, rounded

ADVICE = {
    "rank_dead": "Look at that process and its host, then restart from the last checkpoint.",
    "rank_stuck": "Look at where that process stands: `lens attach --stacks --all-ranks` on its host.",
    "process_stopped": "Continue it (SIGCONT) or find out who stopped it.",
    "collective_mismatch": "Look for a branch that some ranks take and others do not.",
    "unexplained": "Look at the network and at ranks that send no records.",
}


def of_hang(examiner: Examiner, hang: Hang) -> list[Hypothesis]:
    """Why nothing moves any more."""
    ranks, steps = list(hang.ranks), examiner.timeline.steps
    stood = {
        "metric": "heartbeat", "ranks": list(hang.waiting), "baseline": None, "observed": rounded(hang.quiet_s, 3),
        "effect": None,
    }  # fmt: skip
    number = {
        "metric": "comm.sequence", "ranks": ranks, "baseline": hang.seq, "observed": hang.reached, "effect": None,
    }  # fmt: skip
    return [
        hypothesis(
            hang.cause, ranks, severity="error", groups=list(hang.groups),
            component=examiner.topology.component(ranks) if ranks else None,
            confidence=0.4 if hang.cause == "unexplained" else 0.9 if len(ranks) == 1 else 0.7,
            onset_step=int(steps[-1]) if len(steps) else None,
            evidence=[number] if hang.quiet_s is None else [stood, number],
            recommendation=f"{_standstill(hang)}{_deed(hang)}{f'It is at {hang.line}. ' if hang.line else ''}"
            + ("Look at that line." if hang.line else ADVICE[hang.cause]),
        )
    ]  # fmt: skip


def _standstill(hang: Hang) -> str:
    """Since when nothing moves, and who waits where."""
    text = "" if hang.quiet_s is None else f"No progress for {hang.quiet_s:.0f} s. "
    if hang.direct and hang.group:
        verb = "waits" if len(hang.direct) == 1 else "wait"
        text += f"{named(list(hang.direct)).capitalize()} {verb} in {_collective(hang)}"
        behind = sorted(set(hang.waiting) - set(hang.direct))
        text += f", {named(behind)} behind {'it' if len(hang.direct) == 1 else 'them'}. " if behind else ". "
    return text


def _deed(hang: Hang) -> str:
    """What the blamed ranks did instead."""
    who = named(list(hang.ranks)).capitalize()
    reached = f"last in number {hang.reached} of that group" if hang.reached is not None else "never in that group"
    state = f"state {hang.state}, " if hang.state else ""
    did = {
        "rank_dead": f"{who} fell silent ({reached})",
        "rank_stuck": f"{who} {hang.how or 'did not enter it'} ({state}{reached})",
        "process_stopped": f"The process of {named(list(hang.ranks))} is stopped ({reached})",
        "collective_mismatch": f"{who} {hang.how or 'called something else'}",
        "unexplained": f"No rank is known to be late{f': {hang.how}' if hang.how else ''}",
    }[hang.cause]
    return f"{did}. "


def _collective(hang: Hang) -> str:
    number = "" if hang.seq is None else f" {hang.seq}"
    return f"{hang.op or 'collective'}{number} of {hang.group}"
