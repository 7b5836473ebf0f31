"""What a large run sends instead of spans: for each step a vector over ranks of own time, waiting and transfers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sample_runs.cluster.condition import Floats
from sample_runs.cluster.writer import Writer


class Reduced:
    """Sums of one step by phase and by kind of group."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._clear()

    def _clear(self) -> None:
        self._phases: dict[str, tuple[Floats, Floats]] = {}
        self._moved: dict[tuple[str, str, str], tuple[Floats, Floats]] = {}
        self._blocked = np.zeros(self._ranks)

    def phase(self, name: str, lasted: Floats) -> None:
        """A phase is over: its seconds, and what collectives leave of them."""
        self._phases[name] = lasted, lasted - self._blocked
        self._blocked = np.zeros(self._ranks)

    def collective(
        self,
        kind: str,
        op: str,
        phase: str,
        members: NDArray[np.int64],
        entered: Floats,
        last: Floats,
        left: Floats,
    ) -> None:
        """Members [groups, n] entered and left; last [groups]: when the last came."""
        zero = np.zeros(self._ranks)
        wait, transfer = self._moved.setdefault((kind, op, phase), (zero, zero.copy()))
        wait[members] += last[:, None] - entered
        transfer[members] += left - last[:, None]
        self._blocked[members] += left - entered

    def flush(self, writer: Writer, step: int, t_ns: int, lasted: Floats) -> None:
        """Write the step, and begin the next."""
        about: dict[str, Any] = {"step": step, "t_ns": t_ns}
        writer.vectors("step.duration", lasted[None], **about)
        for name, (wall, own) in self._phases.items():
            writer.vectors("phase.duration", wall[None], {"phase": name}, **about)
            if name in ("forward", "backward", "optimizer"):
                writer.vectors("comm.self", own[None], {"phase": name}, **about)
        for (kind, op, phase), (wait, transfer) in self._moved.items():
            labels = {"group kind": kind, "op": op, "phase": phase}
            writer.vectors("comm.wait", wait[None], labels, **about)
            writer.vectors("comm.transfer", transfer[None], labels, **about)
        self._clear()
