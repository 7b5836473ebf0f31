"""``python -m sample_runs.cluster``: simulate a run, and write its records or send them to a server."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sample_runs.cluster import emit
from sample_runs.cluster.faults import FAULTS, Fault
from sample_runs.cluster.layout import CARDS, Layout
from sample_runs.cluster.noise import NOISE
from sample_runs.cluster.simulation import Cluster, simulate


def main() -> int:
    """Run, and return the exit code."""
    parser = _parser()
    chosen = parser.parse_args()
    cards = tuple(chosen.cards.split(",")) if chosen.cards else NOISE[chosen.noise].cards or ("H200",)
    try:
        layout = Layout(chosen.ranks, chosen.tp, chosen.pp, chosen.ep, cards)
        faults = tuple(Fault.parse(text) for text in chosen.fault)
        if any(fault.rank >= chosen.ranks for fault in faults):
            raise ValueError(f"a fault names a rank that is not among the {chosen.ranks}")
    except ValueError as error:
        parser.error(str(error))
    cluster = Cluster(
        layout, chosen.steps, chosen.noise, faults, chosen.seed, save_every=chosen.save_every, name=chosen.run or _name(chosen),
    )  # fmt: skip
    tables = simulate(cluster).tables
    for fault in faults:
        print(f"{fault.name} since step {fault.step}: {fault.kind.cause} on ranks {fault.named(layout) or 'all'}")
    if chosen.server:
        token = os.environ.get("LENS_TOKEN") or chosen.token
        try:
            print(f"{emit.post(cluster.run(), tables, chosen.server, token)} records sent; run {cluster.name}")
        except OSError as error:
            print(f"cluster: {error}", file=sys.stderr)
            return 1
    else:
        print(emit.write(cluster.run(), tables, chosen.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    faults = "\n".join(f"  {name:<24} {kind.meaning}" for name, kind in FAULTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m sample_runs.cluster",
        description="Simulate a training on a cluster, and write what lens would record of it.",
        epilog=f"faults (NAME@STEP:RANK or NAME@STEP:RANKxSTRENGTH):\n{faults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=16, help="ranks, 8 to a host (default: %(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel (default: %(default)s)")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages (default: %(default)s)")
    parser.add_argument("--ep", type=int, default=8, help="expert parallel (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="steps (default: %(default)s)")
    parser.add_argument(
        "--noise", choices=sorted(NOISE), default="clean", help="what is usual (default: %(default)s)"
    )
    parser.add_argument("--cards", metavar="NAMES", help=f"makes by host, of {', '.join(CARDS)} (default: H200)")
    parser.add_argument(
        "--save-every", type=int, default=0, help="steps between checkpoints (default: as the noise does)"
    )
    parser.add_argument(
        "--fault", metavar="NAME@STEP:RANK", action="append", default=[], help="a fault; may be given again"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same records (default: %(default)s)"
    )
    parser.add_argument("--run", metavar="ID", help="id of the run (default: made of the other words)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--out", metavar="DIR", type=Path, default=Path(), help="folder for the file (default: here)"
    )
    target.add_argument("--server", metavar="URL", help="send to this server instead")
    parser.add_argument("--token", metavar="TOKEN", help="its token (default: LENS_TOKEN)")
    return parser


def _name(chosen: argparse.Namespace) -> str:
    faults = [text.split("@")[0] for text in chosen.fault]
    return "-".join(["cluster", str(chosen.ranks), *(faults or ["healthy"]), str(chosen.seed)])


if __name__ == "__main__":
    sys.exit(main())
