"""The command line of the sample run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from sample_runs.moe.faults import DEFAULT_FACTORS, Fault


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the run; exits with a usage message for wrong ones."""
    parser = argparse.ArgumentParser(
        prog="python -m sample_runs.moe",
        description="Train a small mixture-of-experts language model on the Python library's sources.",
        epilog="Under torchrun each process is a rank; without it --world N starts N of them.",
    )
    add = parser.add_argument
    add("--steps", type=int, default=120, help="training steps (default %(default)s)")
    add("--world", type=int, default=None, help="ranks to start (default: 1, or what torchrun started)")
    add(
        "--expert-parallel",
        type=int,
        default=None,
        help="ranks that share the experts (default 2; 1 in a world of 1)",
    )
    add("--experts", type=int, default=8, help="experts of each layer (default %(default)s)")
    add("--layers", type=int, default=2, help="layers (default %(default)s)")
    add("--batch", type=int, default=4, help="sequences a rank and step (default %(default)s)")
    add("--sequence", type=int, default=32, help="tokens of a sequence (default %(default)s)")
    add(
        "--capacity-factor",
        type=float,
        default=1.25,
        help="room of an expert over an even spread (default %(default)s)",
    )
    add("--dropless", action="store_true", help="no capacity: every token reaches its experts")
    add("--learning-rate", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--data-workers", type=int, default=1, help="loader processes a rank (default %(default)s)")
    add("--checkpoint-every", type=int, default=50, metavar="STEPS", help="0 never (default %(default)s)")
    add("--eval-every", type=int, default=50, metavar="STEPS", help="0 never (default %(default)s)")
    add("--eval-batches", type=int, default=4, help="batches of each evaluation (default %(default)s)")
    add(
        "--compile-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="compile attention anew for a step, as a run whose shapes change does; 0 never (default %(default)s)",
    )
    add("--print-every", type=int, default=10, metavar="STEPS", help="0 never (default %(default)s)")
    add("--out", type=Path, default=Path("moe-out"), help="folder for checkpoints (default %(default)s)")
    add("--losses", type=Path, default=None, help="write each rank's local losses to FILE.<rank>, exactly")
    add(
        "--fault",
        type=_fault,
        action="append",
        default=[],
        metavar="NAME@STEP:RANK",
        help=f"break a rank from a step on: {', '.join(DEFAULT_FACTORS)}; may be repeated; xFACTOR sets how much; "
        "hot_expert drops no token; checkpoint@STEP without a rank is a slow disk below all; collapse@STEP needs no rank",
    )
    add("--hosts", type=int, default=1, help="hosts that the ranks play (default: this one)")
    add(
        "--card",
        default="H200",
        help="accelerator that the ranks play, or one a host: H200,MI400 (default %(default)s)",
    )
    add("--name", default="sample MoE", help="name of the run (default %(default)s)")
    add("--no-lens", action="store_true", help="train without lens")
    options = parser.parse_args(arguments)
    options.dropless |= any(fault.name == "hot_expert" for fault in options.fault)
    options.card = options.card.split(",")
    if len(options.card) not in (1, options.hosts):
        parser.error(f"--card names {len(options.card)} cards for {options.hosts} hosts")
    world = options.world or int(os.environ.get("WORLD_SIZE", 1))
    for fault in options.fault:
        if fault.rank is not None and fault.rank >= world:
            parser.error(f"{fault.name} on rank {fault.rank}: the ranks are 0 to {world - 1}")
        if fault.name == "hot_expert" and (options.expert_parallel or min(2, world)) < 2:
            parser.error("hot_expert needs experts on more than one rank: --world 2 or more, --expert-parallel 2")
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def _fault(text: str) -> Fault:
    try:
        return Fault.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
