"""Take lens out of a training that goes on: the hooks put back all that they replaced, at the end of their step.

lens detach PID
lens detach --all-ranks [PID]
"""

from __future__ import annotations

import argparse
import json
import time

from lens.attach import attached, targets
from lens.cli.attach import act_for_owner
from lens.cli.errors import DONE, FAILED, UNUSABLE, CommandError
from lens.cli.options import add_data, settings_of

HELP = "take lens out of a training that goes on"
_LOOK_AGAIN_S = 0.05


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("pid", type=int, nargs="?", metavar="PID", help="the process, or its launcher")
    parser.add_argument("--all-ranks", action="store_true", help="every rank below PID, or of yours on this host")
    parser.add_argument("--wait", type=float, default=30.0, metavar="S", help="seconds for its step to end")
    add_data(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask, and wait until the hooks have left."""
    if arguments.pid is None and not arguments.all_ranks:
        raise CommandError("no process was named", "lens detach PID, or every rank of yours: --all-ranks", UNUSABLE)
    if arguments.all_ranks:
        found = targets.here() if arguments.pid is None else targets.below(arguments.pid)
        pids = [facts.pid for facts in found]
    else:
        pids = [arguments.pid]
    for pid in pids[:1]:
        act_for_owner(pid)
    settings = settings_of(arguments)
    rings = {pid: attached.rings_of(pid, settings) for pid in pids}
    watched = {pid: paths for pid, paths in rings.items() if paths}
    if not watched:
        raise CommandError("none of these processes is watched by lens", "lens list shows the runs")
    for paths in watched.values():
        attached.ask_to_leave(paths)
    end = time.monotonic() + arguments.wait
    left: dict[int, bool] = dict.fromkeys(watched, False)
    while not all(left.values()) and time.monotonic() < end:
        time.sleep(_LOOK_AGAIN_S)
        left = {pid: all(map(attached.has_left, paths)) for pid, paths in watched.items()}
    if arguments.json:
        print(json.dumps({"processes": [{"pid": pid, "left": gone} for pid, gone in left.items()]}))
    else:
        for pid, gone in left.items():
            print(f"{pid}  {'as it was before' if gone else 'asked: it leaves at the end of its step'}")
    return DONE if all(left.values()) else FAILED
