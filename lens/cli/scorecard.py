"""How right verdicts were, over many runs whose truth is known: pure arithmetic from outcomes to a scorecard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

UNEXPLAINED = "unexplained"
NAMED_FROM = 0.05
"""A cause that costs a smaller share of the step need not be named."""
LATENCY_FROM = 0.15
"""Steps to detection are told of faults that cost at least this share."""
BINS = 10
LOOK_ALIKES = (
    ("GPU / link", "slow_device", "slow_link"), ("GPU / expert", "slow_device", "hot_expert"),
    ("quota / link", "cpu_quota", "slow_link"), ("stop / loader", "process_stopped", "slow_dataloader"),
    ("GC / checkpoint", "python_gc", "checkpoint_stall"), ("sequence / GPU", "variable_sequence_length", "slow_device"),
    ("vendor / fault", "mixed_vendor_imbalance", "slow_device"), ("thermal / power", "thermal_throttle", "power_cap"),
)  # fmt: skip

SERVING_LOOK_ALIKES = (
    ("queue / cache", "queue_overload", "kv_cache_exhausted"),
    ("prefill / expert", "prefill_interference", "decode_expert_imbalance"),
    ("prefill / queue", "prefill_interference", "queue_overload"),
    ("cold start / recompilation", "cold_start", "recompilation"), ("cold start / queue", "cold_start", "queue_overload"),
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """A faulty run and what was said of it.

    cause, ranks, onset: the truth. cost: share by which steps became longer, None where it costs no time. causes:
    the best cause of each finding, the verdict first. named, said_ranks, confidence, detected: of the verdict.
    """

    fault: str
    noise: str
    world: int
    cause: str
    ranks: list[int]
    onset: int
    cost: float | None
    causes: list[str]
    said_ranks: list[int]
    confidence: float | None
    detected: int | None

    @property
    def named(self) -> str | None:
        """The cause of the verdict."""
        return self.causes[0] if self.causes else None

    @property
    def right_cause(self) -> bool:
        """Whether the verdict names the cause."""
        return self.named == self.cause

    @property
    def right(self) -> bool:
        """Whether it names cause and ranks."""
        return self.right_cause and self.said_ranks == self.ranks

    @property
    def counts(self) -> bool:
        """Whether the fault must be named."""
        return self.cost is None or self.cost >= NAMED_FROM


@dataclass(frozen=True)
class Paired:
    """A run with two faults. truth: cause and ranks of each, with the share that it costs by itself; said: the best
    cause and the ranks of each finding, in the order of the reply."""

    noise: str
    truth: list[tuple[str, list[int], float]]
    said: list[tuple[str, list[int]]]

    @property
    def wanted(self) -> list[tuple[str, list[int]]]:
        """What must be named."""
        return [(cause, ranks) for cause, ranks, cost in self.truth if cost >= NAMED_FROM]

    @property
    def missed(self) -> list[tuple[str, list[int]]]:
        """What must be named and was not."""
        return [one for one in self.wanted if one not in self.said]


@dataclass(frozen=True)
class Calm:
    """A healthy run and the findings, warnings or worse, that any of its replies would have held."""

    noise: str
    steps: int
    alarms: list[str]
    confidences: list[float]


def scorecard(
    judged: Sequence[Judged],
    calm: Sequence[Calm],
    paired: Sequence[Paired] = (),
    look_alikes: Sequence[tuple[str, str, str]] = LOOK_ALIKES,
) -> dict[str, Any]:
    """All numbers; a share is None where there is nothing to share."""
    counted = [one for one in judged if one.counts]
    known = [one for one in counted if one.cause != UNEXPLAINED]
    unknown = [one for one in counted if one.cause == UNEXPLAINED]
    placed = [one for one in counted if one.right_cause]
    steps = sum(run.steps for run in calm)
    sure = [(one.confidence, one.right) for one in counted if one.confidence is not None]
    sure += [(confidence, False) for run in calm for confidence in run.confidences]
    late = [delay for one in known if (delay := _delay(one)) is not None]
    return {
        "cases": len(counted),
        "cases_too_cheap": len(judged) - len(counted),
        "top1": _share(known, lambda one: one.right_cause),
        "rank_exact": _share(placed, lambda one: one.right),
        "cause_and_ranks": _share(known, lambda one: one.right),
        "unknown_flagged": _share(unknown, lambda one: one.named == UNEXPLAINED),
        "latency_steps_median": median(late) if late else None,
        "latency_cases": len(late),
        "healthy_steps": steps,
        "false_alarms": sum(len(run.alarms) for run in calm),
        "false_alarms_per_1k": _rate(calm),
        "ece": calibration_error(sure),
        "pairs": _of_pairs([one for one in paired if len(one.wanted) == len(one.truth)]),
        "causes": {cause: _of_cause(cause, counted) for cause in sorted({one.cause for one in counted})},
        "noise": {
            noise: {"steps": sum(run.steps for run in runs), "per_1000": _rate(runs), "alarms": _alarms(runs)}
            for noise in sorted({run.noise for run in calm})
            if (runs := [run for run in calm if run.noise == noise])
        },
        "look_alikes": {title: _told_apart(first, second, counted) for title, first, second in look_alikes},
        "unknown": {
            fault: {"cases": len(cases), "flagged": _share(cases, lambda one: one.named == UNEXPLAINED)}
            for fault in sorted({one.fault for one in unknown})
            if (cases := [one for one in unknown if one.fault == fault])
        },
    }  # fmt: skip


def _of_pairs(paired: Sequence[Paired]) -> dict[str, Any]:
    """Runs with two faults that must both be named: how many were, and what else was said."""
    real = [[(cause, ranks) for cause, ranks, _ in one.truth] for one in paired]
    first = [bool(one.said) and one.said[0] in truth for one, truth in zip(paired, real, strict=True)]
    more = sum(finding not in truth for one, truth in zip(paired, real, strict=True) for finding in one.said)
    missed = [cause for one in paired for cause, _ in one.missed]
    return {
        "cases": len(paired),
        "both_named": sum(not one.missed for one in paired) / len(paired) if paired else None,
        "one_named_first": sum(first) / len(paired) if paired else None,
        "others_said": more,
        "missed": {cause: missed.count(cause) for cause in sorted(set(missed))},
    }


def calibration_error(sure: Sequence[tuple[float | None, bool]]) -> float | None:
    """Expected calibration error: mean distance of confidence from the share that was right, over ten equal bins."""
    known = [(confidence, right) for confidence, right in sure if confidence is not None]
    if not known:
        return None
    error = 0.0
    for number in range(BINS):
        inside = [(c, r) for c, r in known if min(int(c * BINS), BINS - 1) == number]
        error += abs(sum(c for c, _ in inside) - sum(r for _, r in inside))
    return error / len(known)


def _of_cause(cause: str, judged: Sequence[Judged]) -> dict[str, Any]:
    """Precision, recall and top-1 of one cause, with what it was taken for."""
    mine = [one for one in judged if one.cause == cause]
    said = [one for one in judged if one.named == cause]
    delays = [delay for one in mine if (delay := _delay(one)) is not None]
    wrong = [one.named or "nothing" for one in mine if not one.right_cause]
    return {
        "cases": len(mine),
        "precision": _share(said, lambda one: one.cause == cause),
        "recall": _share(mine, lambda one: cause in one.causes),
        "top1": _share(mine, lambda one: one.right_cause),
        "rank_exact": _share([one for one in mine if one.right_cause], lambda one: one.right),
        "latency_steps": median(delays) if delays else None,
        "taken_for": {name: wrong.count(name) for name in sorted(set(wrong))},
    }


def _told_apart(first: str, second: str, judged: Sequence[Judged]) -> dict[str, Any]:
    """Runs of two causes that look alike: how many were called by their name, by the other's, or something else."""
    result: dict[str, Any] = {}
    for cause, other in ((first, second), (second, first)):
        mine = [one for one in judged if one.cause == cause]
        result[cause] = {
            "cases": len(mine),
            "right": sum(one.right_cause for one in mine),
            f"as_{other}": sum(one.named == other for one in mine),
        }
    return result


def _delay(one: Judged) -> int | None:
    if not one.right_cause or one.detected is None or one.cost is None or one.cost < LATENCY_FROM or not one.onset:
        return None
    return max(0, one.detected - one.onset)


def _share(cases: Sequence[Judged], test: Callable[[Judged], bool]) -> float | None:
    return sum(map(test, cases)) / len(cases) if cases else None


def _rate(runs: Sequence[Calm]) -> float | None:
    steps = sum(run.steps for run in runs)
    return 1000 * sum(len(run.alarms) for run in runs) / steps if steps else None


def _alarms(runs: Sequence[Calm]) -> dict[str, int]:
    said = [alarm for run in runs for alarm in run.alarms]
    return {alarm: said.count(alarm) for alarm in sorted(set(said))}


def describe(card: dict[str, Any]) -> str:
    """The scorecard as Markdown, for people and pages."""
    lines = [
        "| measure | measured |", "|---|---|",
        f"| cases (left out: faults that cost under {100 * NAMED_FROM:.0f} %) | {card['cases']} ({card['cases_too_cheap']}) |",
        f"| cause named first | {_said(card['top1'])} |",
        f"| exact ranks, where the cause is right | {_said(card['rank_exact'])} |",
        f"| cause and ranks right | {_said(card['cause_and_ranks'])} |",
        f"| unknown faults called `unexplained` | {_said(card['unknown_flagged'])} |",
        f"| median steps to detection, slowdown from {100 * LATENCY_FROM:.0f} % on | {_said(card['latency_steps_median'])} "
        f"({card['latency_cases']} cases) |",
        f"| false alarms per 1,000 healthy steps | {_said(card['false_alarms_per_1k'])} "
        f"({card['false_alarms']} in {card['healthy_steps']}) |",
        f"| expected calibration error | {_said(card['ece'])} |",
        "", "| cause | cases | precision | recall | named first | exact ranks | steps to detect | taken for |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for cause, row in card["causes"].items():
        wrong = ", ".join(f"{name} {count}" for name, count in row["taken_for"].items())
        numbers = (row[key] for key in ("precision", "recall", "top1", "rank_exact", "latency_steps"))
        lines.append(f"| {cause} | {row['cases']} | {' | '.join(map(_said, numbers))} | {wrong} |")
    pairs = card["pairs"]
    missed = ", ".join(f"{name} {count}" for name, count in pairs["missed"].items())
    lines += [
        "", "| two faults at once | cases | both named | one of them first | findings that are neither | not named |",
        "|---|---|---|---|---|---|",
        f"| on different ranks | {pairs['cases']} | {_said(pairs['both_named'])} | {_said(pairs['one_named_first'])} | "
        f"{pairs['others_said']} | {missed} |",
    ]  # fmt: skip
    lines += ["", "| healthy, with noise of | steps | false alarms per 1,000 | which |", "|---|---|---|---|"]
    for noise, row in card["noise"].items():
        which = ", ".join(f"{name} {count}" for name, count in row["alarms"].items())
        lines.append(f"| {noise} | {row['steps']} | {_said(row['per_1000'])} | {which} |")
    lines += ["", "| look-alikes | cause | cases | named right | named the other |", "|---|---|---|---|---|"]
    for title, pair in card["look_alikes"].items():
        for cause, row in pair.items():
            other = next(value for key, value in row.items() if key.startswith("as_"))
            lines.append(f"| {title} | {cause} | {row['cases']} | {row['right']} | {other} |")
    if card["unknown"]:
        lines += ["", "| unknown fault | cases | called unexplained |", "|---|---|---|"]
    lines += [f"| {fault} | {row['cases']} | {_said(row['flagged'])} |" for fault, row in card["unknown"].items()]
    if card.get("services"):
        lines += ["", "Services, by iterations instead of steps:", "", describe(card["services"])]
    return "\n".join(lines)


def _said(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"
