"""See into a training that is already running, without a restart and without a line in it.

    lens attach PID                 one process
    lens attach --all-ranks PID     every rank below a torchrun launcher
    lens attach --all-ranks         every rank of yours on this host
    lens attach --check PID         only say what would work and what would not
    lens attach --observe PID       do not enter: processor, memory, card; no steps, no phases
    lens attach --stacks PID        where its Python code stands, all ranks of a launcher with --all-ranks
    lens attach --profile N PID     torch's profiler over N steps, the same ones of all ranks with --all-ranks

The main thread of each process stands still for about a millisecond; from its next step on it is recorded like one
that lens started. `lens detach PID` takes everything out again. Linux, CPython 3.10 to 3.13 on
x86-64, and 3.14 by a lens of the same version.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from lens.attach import preflight, privilege, targets, ways
from lens.attach.facts import Facts, look
from lens.attach.preflight import OBSERVING_RULES, Refusal
from lens.attach.ways import Way
from lens.cli.errors import DONE, FAILED, UNREACHABLE, UNUSABLE, CommandError, missing_extra
from lens.cli.options import add_data, add_server, settings_of

if TYPE_CHECKING:
    from lens.attach.attached import Outcome
    from lens.settings import Settings

HELP = "see into a training that is already running"
SERVER_PATIENCE_S = 60.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("pid", type=int, nargs="?", metavar="PID", help="the process, or its launcher")
    parser.add_argument("--all-ranks", action="store_true", help="every rank below PID, or of yours on this host")
    parser.add_argument("--check", action="store_true", help="change nothing: only say what would work")
    parser.add_argument(
        "--observe", action="store_true", help="do not enter: only measure what is seen from outside"
    )
    parser.add_argument(
        "--stacks", action="store_true", help="only read who stands where in the code; nothing runs in them"
    )
    parser.add_argument(
        "--profile", type=int, metavar="N", help="run torch's profiler over N steps, and leave again"
    )
    parser.add_argument(
        "--method",
        choices=sorted(ways.WAYS),
        help="how to enter (default: its socket if it has one, else by its version)",
    )
    parser.add_argument("--wait", type=float, default=30.0, metavar="S", help="seconds for its next step to come")
    parser.add_argument("--duration", type=float, metavar="S", help="detach again after so many seconds")
    parser.add_argument("--run", help="run id (default: drawn)")
    parser.add_argument("--name", help="a name for people")
    add_server(parser)
    add_data(parser)


def run(arguments: argparse.Namespace) -> int:
    """Attach, and say what came of it, process by process."""
    chosen = _chosen(arguments)
    if arguments.stacks:
        from lens.cli import attach_stacks

        return attach_stacks.run(chosen, settings_of(arguments), arguments.wait, arguments.json)
    if arguments.profile is not None:
        return _profile(arguments, chosen)
    if arguments.observe:
        return _observe(arguments, chosen)
    if arguments.check:
        return _report_check([(facts, refusal) for facts, _, refusal in _judged(arguments, chosen)], arguments.json)
    entries = _ways(arguments, chosen)
    if act_for_owner(chosen[0].pid):
        # What root may read that user may not.
        entries = _ways(arguments, [look(facts.pid) for facts in chosen])
    # From here on the target is entered: what only that needs is loaded now, so that a refusal comes at once.
    import time

    from lens.attach import attached

    settings = _serving(arguments)
    outcomes = [attached.attach(facts.pid, settings, arguments.wait, way) for facts, way in entries]
    _report(outcomes, settings, arguments.json)
    if arguments.duration is not None:
        time.sleep(arguments.duration)
        attached.ask_to_leave([outcome.ring for outcome in outcomes if outcome.ring])
    return FAILED if any(outcome.state == "failed" for outcome in outcomes) else DONE


def _profile(arguments: argparse.Namespace, chosen: list[Facts]) -> int:
    if arguments.profile < 1:
        raise CommandError(
            "--profile takes the number of steps, 1 or more", "lens attach --profile 2 PID", UNUSABLE
        )
    from lens.cli import attach_profile
    from lens.cli.run import new_run_id

    act_for_owner(chosen[0].pid)
    settings = settings_of(arguments, run=arguments.run or new_run_id(), name=arguments.name or "profiled")
    return attach_profile.run(chosen, settings, arguments.profile, arguments.wait, arguments.json)


def _observe(arguments: argparse.Namespace, chosen: list[Facts]) -> int:
    for facts in chosen:
        refusal = preflight.judge(facts, OBSERVING_RULES)
        if refusal is not None:
            raise CommandError(refusal.reason, refusal.fix)
    from lens.attach import observed
    from lens.attach.attached import Outcome

    settings = _serving(arguments, "observed")
    outcomes = []
    for facts in chosen:
        try:
            observed.observe(facts, settings)
            outcomes.append(Outcome(facts.pid, "observed", "from outside: no phases", facts.rank))
        except OSError as error:
            outcomes.append(Outcome(facts.pid, "failed", f"it cannot be observed ({error.strerror})", facts.rank))
    _report(outcomes, settings, arguments.json)
    return FAILED if any(outcome.state == "failed" for outcome in outcomes) else DONE


def _judged(arguments: argparse.Namespace, chosen: list[Facts]) -> list[tuple[Facts, Way, Refusal | None]]:
    """How each process would be entered, and what forbids it."""
    settings = settings_of(arguments)
    method = ways.WAYS.get(arguments.method)
    found = [(facts, method or ways.choose(facts, settings)) for facts in chosen]
    return [(facts, way, ways.judge(facts, way, settings)) for facts, way in found]


def _ways(arguments: argparse.Namespace, chosen: list[Facts]) -> list[tuple[Facts, Way]]:
    """How each process is entered; an error where one may not be."""
    judged = _judged(arguments, chosen)
    for facts, _, refusal in judged:
        if refusal is not None:
            raise CommandError(refusal.reason, _fix(facts, refusal))
    return [(facts, way) for facts, way, _ in judged]


def _fix(facts: Facts, refusal: Refusal) -> str:
    """What to do about a refusal; where there is a process, what can be had all the same."""
    if facts.state is None:
        return refusal.fix
    return f"{refusal.fix}; or from outside, without steps and phases: lens attach --observe {facts.pid}"


def act_for_owner(pid: int) -> bool:
    """As root become the owner of the process; whether that was needed."""
    try:
        return privilege.act_for(pid)
    except OSError as error:
        raise CommandError(
            f"root cannot act for the owner of process {pid}: {error}", "install lens where that user can read it"
        ) from error


def _chosen(arguments: argparse.Namespace) -> list[Facts]:
    if arguments.pid is None and not arguments.all_ranks:
        raise CommandError("no process was named", "lens attach PID, or every rank of yours: --all-ranks", UNUSABLE)
    if not arguments.all_ranks:
        facts = look(arguments.pid)
        ranks = targets.below(arguments.pid) if facts.state else []
        if ranks and facts.pid not in [rank.pid for rank in ranks]:
            pids = ", ".join(str(rank.pid) for rank in ranks)
            raise CommandError(
                f"process {facts.pid} is a launcher; the processes below it that train are {pids}",
                f"lens attach --all-ranks {facts.pid}",
                UNUSABLE,
            )
        return [facts]
    found = targets.here() if arguments.pid is None else targets.below(arguments.pid)
    if not found:
        where = "on this host" if arguments.pid is None else f"below process {arguments.pid}"
        raise CommandError(
            f"no process {where} has torch loaded", "ps -ef shows what runs; name it: lens attach PID"
        )
    return found


def _serving(arguments: argparse.Namespace, name: str = "attached") -> Settings:
    """Settings of the run, with a server that takes its records and an agent that ships them."""
    from lens.cli.run import new_run_id
    from lens.reading.connection import owner_of

    settings = settings_of(arguments, run=arguments.run or new_run_id(), name=arguments.name or name)
    if settings.server is None:
        if owner_of(settings.data) is None:
            _start_server(settings)
        settings = dataclasses.replace(settings, server=str((owner_of(settings.data) or {}).get("url")))
    if not settings.agent:
        return settings
    try:
        from lens.collectors.agent import ensure_agent
        from lens.collectors.launch import agent_about
    except ImportError as error:
        raise missing_extra(error, "all") from error
    if not ensure_agent(dataclasses.replace(settings, token=settings.read_token())):
        pid, server = agent_about(settings) or (0, settings.server)
        if server != settings.server:
            print(
                f"lens: the agent of this host (process {pid}) ships to {server or 'no server'}, and this run with it\n"
                f"      to have it at {settings.server}: kill {pid}, then attach again",
                file=sys.stderr,
            )
    return settings


def _start_server(settings: Settings) -> None:
    """A server that stays when we are gone: what it keeps is to be looked at."""
    import subprocess

    from lens.cli.processes import wait_until
    from lens.reading.connection import owner_of

    try:
        settings.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"no data folder can be made: {error}", "name another: --data DIR", UNUSABLE) from error
    command = [sys.executable, "-m", "lens", "serve", "--data", str(settings.data), "--port", "0"]
    with (settings.data / "server.log").open("ab") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    if not wait_until(lambda: owner_of(settings.data) is not None, SERVER_PATIENCE_S, child):
        raise CommandError(
            "no server could be started",
            f"see {settings.data / 'server.log'}, or name one: --server URL",
            UNREACHABLE,
        )
    print(f"lens: started a server (process {child.pid}); end it with: kill {child.pid}", file=sys.stderr)


def _report(outcomes: list[Outcome], settings: Settings, as_json: bool) -> None:
    page = f"{settings.server}/run/{settings.run}"
    if as_json:
        found = [
            {**dataclasses.asdict(outcome), "ring": str(outcome.ring) if outcome.ring else None}
            for outcome in outcomes
        ]
        print(json.dumps({"run": settings.run, "url": page, "processes": found}), flush=True)
        return
    for outcome in outcomes:
        stood = "" if outcome.stopped_ms is None else f", stood still {outcome.stopped_ms:.1f} ms"
        rank = "" if outcome.rank is None else f" rank {outcome.rank}"
        said = f": {outcome.text}" if outcome.text else ""
        print(f"{outcome.pid}{rank}  {outcome.state}{said}{stood}")
    token = settings.read_token()
    print(f"\npage:  {page}{f'?token={token}' if token else ''}\nrun:   {settings.run}", flush=True)


def _report_check(judged: list[tuple[Facts, Refusal | None]], as_json: bool) -> int:
    code = FAILED if any(refusal for _, refusal in judged) else DONE
    if as_json:
        found: list[dict[str, Any]] = [
            {
                "pid": facts.pid,
                "rank": facts.rank,
                "can": refusal is None,
                "refusal": dataclasses.asdict(refusal) if refusal else None,
            }
            for facts, refusal in judged
        ]
        print(json.dumps({"processes": found}))
        return code
    for facts, refusal in judged:
        print(f"process {facts.pid}")
        for name, text in preflight.said(facts).items():
            print(f"  {name:<12} {text}")
        verdict = "can be attached to" if refusal is None else f"{refusal.reason}\n{'':<15}{refusal.fix}"
        print(f"  {'attach':<12} {verdict}")
    return code
