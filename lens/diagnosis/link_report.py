"""Slower transfers in the words and numbers of the reply."""

from __future__ import annotations

from lens.diagnosis.examine import Examiner
from lens.diagnosis.network import LinkVerdict, Pair
from lens.diagnosis.places import CARD, FABRIC, HOST, PORT
from lens.diagnosis.report import (
    Hypothesis,
    device_hours,
    evidence_of,
    hypothesis,
    milliseconds,
    moved,
    named,
    probability,
    rounded,
)
from lens.diagnosis.signatures import UNEXPLAINED_ADVICE, UNMOVED

MOST_GROUPS = 16
MOST_AGAINST = 4
UNLOCATED = 0.3
"""How likely it is that nobody in particular is to blame when nobody can be named."""
STEMS = {
    PORT: "Everything that crosses the port of {ranks}{at}",
    CARD: "Everything within the host that {ranks}{at} take part in",
    HOST: "Everything that leaves {component}",
    FABRIC: "Everything that leaves a host",
}


def of_link(examiner: Examiner, link: LinkVerdict) -> list[Hypothesis]:
    """The explanations of slower transfers, best first."""
    steps, topology = examiner.timeline.steps, examiner.topology
    now = examiner.step_seconds(link.after)
    fixed = now / link.ratio if now is not None and link.ratio else None
    lost = now - fixed if now is not None and fixed is not None else None
    result = []
    for number, pair in enumerate(link.listed):
        explained, place = pair.explained, pair.place
        ranks = topology.ranks[list(place.rows)].tolist()
        signature = explained.signature
        advice = signature.advice if signature else UNEXPLAINED_ADVICE
        component = place.component
        result.append(
            hypothesis(
                explained.cause, ranks,
                severity=signature.severity if signature else "warning",
                groups=link.groups if len(link.groups) <= MOST_GROUPS else [],
                component=component,
                confidence=probability(pair.probability * link.sure * (UNLOCATED if place.among else 1.0)),
                onset_step=int(steps[0] if link.standing else steps[link.onset]),
                end_step=None if link.last is None else int(steps[link.last]),
                slowdown_pct=rounded(100 * (link.ratio - 1), 2) if link.ratio else None,
                lost_seconds_per_step=rounded(lost, 6),
                lost_device_hours=rounded(device_hours(lost, len(link.after), examiner), 6),
                evidence=[evidence_of(pair.measures[name], ranks) for name in _moved_names(pair)],
                against=_against(link) if number == 0 else [],
                recommendation=_sentence(link, pair, ranks, lost)
                + advice.format(component=component or "the fabric", ranks=named(ranks) if ranks else "all ranks"),
                what_if={"step_seconds_now": rounded(now, 6), "step_seconds_if_fixed": rounded(fixed, 6)},
            )
        )  # fmt: skip
    return result


def _moved_names(pair: Pair) -> list[str]:
    """The transfer itself, then every measure with a number that speaks for the explanation."""
    gains = sorted(pair.explained.gains.items(), key=lambda item: (-item[1], item[0]))
    names = [name for name, gain in gains if gain > 0 and pair.measures[name].observed is not None]
    return ["transfer", *(name for name in names if name != "transfer")]


def _against(link: LinkVerdict) -> list[dict[str, str]]:
    """For each look-alike that lost: the measure that spoke most clearly against it."""
    best, result, told = link.best, [], set()
    own = best.measures["compute"]
    if own.level is not None and abs(own.level) <= UNMOVED:
        result.append({"cause": "slow_device", "because": moved(own)})
    for rival in link.pairs:
        cause = rival.explained.cause
        losses = [
            (loss, name) for name, loss in rival.explained.gains.items()
            if loss <= -0.5 and rival.measures[name].level is not None
        ]  # fmt: skip
        if cause != best.explained.cause and cause not in told and rival.place is best.place and losses:
            told.add(cause)
            result.append({"cause": cause, "because": _because(rival, min(losses)[1])})
    return result[:MOST_AGAINST]


def _because(pair: Pair, name: str) -> str:
    measure = pair.measures[name]
    if measure.observed is not None:
        return moved(measure)
    rose = (measure.level or 0.0) > UNMOVED
    return {
        "whole": "transfers that avoid it did not change",
        "wide": "transfers of the whole switch or fabric are slower"
        if rose
        else "transfers elsewhere did not change",
        "inside": "only transfers within the host are slower"
        if rose
        else "transfers that leave the host are slower",
        "latency": "small collectives lost as many seconds as large ones" if rose else "large transfers lost most",
    }.get(name, moved(measure))


def _sentence(link: LinkVerdict, pair: Pair, ranks: list[int], lost: float | None) -> str:
    explained, place = pair.explained, pair.place
    at = f" ({place.component})" if place.component else ""
    stem = STEMS.get(place.scope, "Everything that crosses {component}").format(
        ranks=named(ranks), at=at, component=place.component or named(ranks)
    )
    if place.among:
        stem = f"The transfers of {', '.join(link.groups[:3])}{' and others' if len(link.groups) > 3 else ''}"
    verb = "take" if place.among else "takes"
    than = "than like transfers" if link.standing else "than before"
    text = f"{stem} {verb} {milliseconds(link.gain_s)} a step longer {than}"
    if lost is not None and link.ratio is not None:
        text += f", which costs every rank {milliseconds(lost)} a step ({100 * (link.ratio - 1):.0f} %)"
    reasons = [
        name for name, gain in sorted(explained.gains.items(), key=lambda item: (-item[1], item[0]))
        if gain >= 1 and pair.measures[name].observed is not None
    ]  # fmt: skip
    if reasons:
        text += f"; {moved(pair.measures[reasons[0]])}"
    if place.among:
        text += "; which of its ports it is cannot be told from these records"
    return text + ". "
