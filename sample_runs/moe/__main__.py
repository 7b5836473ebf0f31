"""``python -m sample_runs.moe``: one rank under torchrun; otherwise it starts ``--world`` ranks itself."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from sample_runs.moe import options


def main() -> int:
    """Run, and return the exit code."""
    chosen = options.parse()
    if "RANK" not in os.environ and (chosen.world or 1) > 1:
        start_ranks(chosen.world)
    from sample_runs.moe import train

    return train.main(chosen)


def start_ranks(world: int) -> NoReturn:
    """Become torchrun, which starts this program once a rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # In this process's place, so that signals and the exit code are torchrun's own.
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "sample_runs.moe", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
