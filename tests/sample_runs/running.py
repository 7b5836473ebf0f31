"""Running the sample as a user would."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.hooks.ringside import run_python

STEPS = 30


def train(folder: Path, world: int, *more: str, steps: int = STEPS) -> subprocess.CompletedProcess[str]:
    """Train with lens; rings lie in ``rings``, checkpoints in ``out``."""
    arguments = ["--world", str(world), "--steps", str(steps), "--out", str(folder / "out"), "--print-every", "10"]
    done = run_python(["-m", "sample_runs.moe", *arguments, *more], folder / "rings", timeout=200)
    assert done.returncode == 0, done.stderr
    return done
