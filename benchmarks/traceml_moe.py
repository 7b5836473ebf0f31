"""The sample training with TraceML where lens would be; `traceml run` starts it, once a rank.

traceml run benchmarks/traceml_moe.py --nproc-per-node 4 --args --steps 120 --fault slow_compute@40:2
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import traceml_ai

from sample_runs.moe import options, train
from sample_runs.moe.observe import Unobserved


class Traced(Unobserved):
    """What its documentation asks a training loop for: `init`, and `trace_step` around every step."""

    def __init__(self) -> None:
        traceml_ai.init(mode="auto")
        self._model: Any = None

    def watch(self, *arguments: Any, **more: Any) -> None:
        """Keep the model, which `trace_step` wants."""
        self._model = arguments[0]

    def step(self, number: int, **attributes: Any) -> contextlib.AbstractContextManager[None]:
        """A step that TraceML sees."""
        step: contextlib.AbstractContextManager[None] = traceml_ai.trace_step(self._model)
        return step


if __name__ == "__main__":
    train.observer = lambda with_lens: Traced()
    sys.exit(train.main(options.parse()))
