"""How right the diagnosis is: faults put into simulated clusters, and the scorecard of what was said of them.

Each case is a run of `sample_runs.cluster`, whose physics is open and whose truth is known, judged by the same engine
as `lens diagnose`. Healthy runs are judged at every step at which a reply could change. The same seed gives the same
scorecard.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from lens.cli.errors import DONE, MISSING, UNUSABLE, CommandError, missing_extra
from lens.cli.scorecard import SERVING_LOOK_ALIKES, Calm, Judged, Paired, describe, scorecard

if TYPE_CHECKING:
    from lens.tables import Tables
    from sample_runs.cluster import Case, Pair, ServiceCase

    AnyCase = Case | Pair | ServiceCase

HELP = "how right the diagnosis is: a scorecard over simulated faults"
MOST_PROCESSES = 4
TROUBLED_BY_HEALTHY = 2
"""For so many services with a trouble one healthy service is judged."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--cases", type=int, default=92, metavar="N", help="faulty runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="seed of all cases (default: %(default)s)")
    parser.add_argument(
        "--healthy-steps", type=int, default=4000, metavar="N", help="steps of healthy runs (default: %(default)s)"
    )
    parser.add_argument(
        "--pairs", type=int, default=0, metavar="N", help="runs with two faults at once (default: %(default)s)"
    )
    parser.add_argument(
        "--services",
        type=int,
        default=8,
        metavar="N",
        help="services in trouble, and half as many healthy ones (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Judge all cases and print the scorecard."""
    if min(arguments.cases, arguments.healthy_steps, arguments.pairs, arguments.services) < 0:
        raise CommandError("a number of cases or steps is below 0", "lens selftest --cases 46", UNUSABLE)
    try:
        import sample_runs.cluster  # noqa: F401
    except ImportError as error:
        if (error.name or "").startswith("sample_runs"):
            raise CommandError(
                "the simulated cluster (the package sample_runs) is not installed",
                "install lens from its wheel or its repository, which bring it",
                MISSING,
            ) from error
        raise missing_extra(error, "server") from error
    card = assess(arguments.cases, arguments.healthy_steps, arguments.pairs, arguments.seed)
    if arguments.services:
        card["services"] = assess_services(arguments.services, arguments.seed)
    if arguments.json:
        print(json.dumps(card, ensure_ascii=False))
    else:
        print(describe(card))
    return DONE


def assess(cases: int, healthy_steps: int, pairs: int, seed: int) -> dict[str, Any]:
    """The scorecard over so many faulty runs, steps of healthy runs and runs with two faults, with each run's own verdict.

    Raises:
        ImportError: the simulated cluster, or numpy, is not installed.
    """
    from sample_runs.cluster import draw_cases, draw_healthy, draw_pairs

    drawn: list[AnyCase] = [*draw_cases(cases, seed), *draw_healthy(healthy_steps, seed), *draw_pairs(pairs, seed)]
    judged, calm, paired = _outcomes(drawn)
    every = {"judged": [asdict(one) for one in judged], "paired": [asdict(one) for one in paired]}
    return {"seed": seed, **scorecard(judged, calm, paired), **every}


def assess_services(count: int, seed: int) -> dict[str, Any]:
    """The same over so many services in trouble and half as many healthy ones; steps are iterations.

    Raises:
        ImportError: the simulated cluster, or numpy, is not installed.
    """
    from sample_runs.cluster import draw_served, draw_services

    judged, calm, _ = _outcomes([*draw_services(count, seed), *draw_served(count // TROUBLED_BY_HEALTHY, seed)])
    every = {"judged": [asdict(one) for one in judged]}
    return {"seed": seed, **scorecard(judged, calm, (), SERVING_LOOK_ALIKES), **every}


def _outcomes(drawn: Sequence[AnyCase]) -> tuple[list[Judged], list[Calm], list[Paired]]:
    judged: list[Judged] = []
    calm: list[Calm] = []
    paired: list[Paired] = []
    for number, result in enumerate(_all_judged(drawn), 1):
        if isinstance(result, Judged):
            judged.append(result)
        elif isinstance(result, Paired):
            paired.append(result)
        else:
            calm.append(result)
        if sys.stderr.isatty():
            print(f"\r{number} of {len(drawn)} runs", end="" if number < len(drawn) else "\n", file=sys.stderr)
    return judged, calm, paired


def _all_judged(cases: Sequence[AnyCase]) -> Iterator[Judged | Calm | Paired]:
    """The cases in order, several at once where there are processors."""
    processes = min(
        MOST_PROCESSES, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(cases)
    )
    if processes < 2:
        yield from map(judge, cases)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(judge, cases)


def judge(case: AnyCase) -> Judged | Calm | Paired:
    """Simulate a case and ask the engine."""
    from sample_runs.cluster import Pair, ServiceCase, serve, simulate

    if isinstance(case, Pair):
        return _paired(case)
    if isinstance(case, ServiceCase):
        service, served = case.service, serve(case.service)
        about = service.run(), served.tables
        if case.trouble is None:
            return _calm(service.noise, service.iterations, *about)
        trouble, cost = case.trouble, case.cost(served)
        known: dict[str, Any] = {"fault": trouble.name, "noise": service.noise, "onset": trouble.step, "cost": cost}
        return _judged(case, *about, **known)
    outcome = simulate(case.cluster)
    cluster = case.cluster
    if case.fault is None:
        return _calm(cluster.noise, cluster.steps, cluster.run(), outcome.tables)
    known = {"fault": case.fault.name, "noise": cluster.noise, "onset": case.fault.step, "cost": case.cost(outcome)}
    return _judged(case, cluster.run(), outcome.tables, **known)


def _judged(case: Case | ServiceCase, run: dict[str, Any], tables: Tables, **known: Any) -> Judged:
    from lens.diagnosis import diagnose

    assert case.cause is not None
    reply = diagnose(run, tables)
    # What is true of the cluster beside the fault (cards of two makes) is information, not the verdict.
    found: list[dict[str, Any]] = [
        item for item in reply["hypotheses"] if item["severity"] != "info" or item["cause"] == case.cause
    ]
    first: dict[str, Any] = found[0] if found else {"ranks": [], "confidence": None, "detected_step": None}
    seen: dict[int, str] = {}
    for item in found:
        seen.setdefault(item["finding"], item["cause"])
    return Judged(
        world=run["world_size"], cause=case.cause, ranks=case.ranks, causes=list(seen.values()), said_ranks=first["ranks"],
        confidence=first["confidence"], detected=first["detected_step"], **known,
    )  # fmt: skip


def _paired(pair: Pair) -> Paired:
    from lens.diagnosis import diagnose
    from sample_runs.cluster import simulate

    reply = diagnose(pair.cluster.run(), simulate(pair.cluster).tables)
    said: dict[int, tuple[str, list[int]]] = {}
    for item in reply["hypotheses"]:
        if item["severity"] != "info":
            said.setdefault(item["finding"], (item["cause"], item["ranks"]))
    truth = [(*one, cost) for one, cost in zip(pair.truth(), pair.costs(), strict=True)]
    return Paired(pair.cluster.noise, truth, list(said.values()))


def _calm(noise: str, steps: int, run: dict[str, Any], tables: Tables) -> Calm:
    """The findings that a reply up to any step of a healthy run would have held."""
    from lens.diagnosis import diagnose
    from lens.diagnosis.examine import Examiner
    from lens.diagnosis.grids import grid
    from lens.diagnosis.judge import CAUSES, Judge
    from lens.diagnosis.select import Timeline
    from lens.diagnosis.topology import Topology

    reply = diagnose(run, tables)
    timeline = Timeline.of(tables)
    examiner = Examiner.of(tables, timeline, Topology.of(run, tables))
    judge, raised = Judge(examiner), examiner.first_raised()
    places = set(grid(steps).tolist()) | set(range(steps if raised is None else raised, steps))
    held: set[tuple[str, tuple[int, ...]]] = set()
    for place in sorted(places):
        told = {(n.cause, n.rows) for n in judge.at(place)[1] if CAUSES[n.cause].severity == "info"}
        held |= judge.named(place) - told
    said = [item for item in reply["hypotheses"] if item["severity"] != "info"]
    # What ends a run is in the last reply alone.
    held |= {(item["cause"], tuple(item["ranks"])) for item in said if item["severity"] == "error"}
    return Calm(noise, steps, sorted(cause for cause, _ in held), [item["confidence"] for item in said[:1]])
