"""The pipeline's bubble: the share of a pass in which ranks idle for other stages, and what the schedule makes of it.

With p stages that take t for the forward and backward pass of a micro-batch, and m micro-batches, every rank works m·t
of (m + p − 1)·t and idles (p − 1) / (m + p − 1) of it. All forward before all backward (Huang et al., "GPipe", NeurIPS
2019, section 2.3) and one forward one backward (1F1B; Narayanan et al., "Efficient Large-Scale Language Model Training
on GPU Clusters Using Megatron-LM", SC 2021, section 2.2, as (p − 1) / m of the time without bubble) idle the same: they
differ in memory. Interleaved stages idle less, zero-bubble schedules next to nothing. What is measured beyond the
theory comes from stages that take unequal time, from slow ranks and from transfers between stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lens.diagnosis.arrays import Array, Floats, Ints, finite_median, pack
from lens.diagnosis.decompose import Frame
from lens.tables import Tables

PASS = ("forward", "backward")
NO_MESSAGES = "no send or receive between neighbouring stages tells the number of micro-batches"
NO_PASS = "the phases forward and backward, or the collectives, are not known"
INTERLEAVED = "stages are interleaved: the last sends to the first, and 1F1B's bubble is not theirs"


@dataclass(frozen=True)
class Bubble:
    """Shares of the time of a pass, 0 … 1. stages: p. micro_batches: m, None where it cannot be known. measured: idle share
    of the mean rank. theory: (p − 1) / (m + p − 1). reason: why one of them is None."""

    stages: int
    micro_batches: int | None
    measured: float | None
    theory: float | None
    reason: str | None

    def shown(self) -> dict[str, Any]:
        """As the ledger shows it."""
        return {
            "stages": self.stages, "micro_batches": self.micro_batches, "schedule": "1F1B",
            "bubble_share": None if self.measured is None else round(self.measured, 4),
            "theory_share": None if self.theory is None else round(self.theory, 4), "reason": self.reason,
        }  # fmt: skip

    def words(self) -> str:
        """Measured and theory in words; for a measured bubble."""
        text = f"ranks idle {100 * (self.measured or 0.0):.0f} % of their passes for other stages"
        if self.theory is None:
            return f"{text}; what the schedule makes of it is not known: {self.reason}"
        return (
            f"{text}, {100 * self.theory:.0f} % are what 1F1B makes of {self.stages} equal stages and "
            f"{self.micro_batches} micro-batches"
        )


def bubble(frame: Frame, tables: Tables, steps: Ints) -> Bubble | None:
    """The bubble over these steps; None where there is no pipeline."""
    stages = len({stage for stage in frame.topology.stage if stage is not None})
    if stages < 2 or not len(steps):
        return None
    measured = _idle_share(frame, tables, steps)
    batches, reason = _micro_batches(frame, steps, stages)
    theory = None if batches is None else (stages - 1) / (batches + stages - 1)
    return Bubble(stages, batches, measured, theory, NO_PASS if measured is None else reason)


def _micro_batches(frame: Frame, steps: Ints, stages: int) -> tuple[int | None, str | None]:
    """Micro-batches of a step, as steps say or by the messages from each stage to the next; with why they are not known."""
    links = _links(frame)
    if stages > 2 and (stages - 1, 0) in links.values():
        return None, INTERLEAVED
    said = frame.count.get("micro_batches")
    known = None if said is None else finite_median(said[steps])
    if known is None:
        collectives = frame.collectives
        onwards = [group for group, (source, target) in links.items() if target == source + 1]
        rows = np.isin(collectives.group, onwards) & np.isin(collectives.step, steps)
        if not rows.any():
            return None, NO_MESSAGES
        # Either side of a message may have recorded it: each collective counts once.
        messages = np.unique(np.stack([collectives.instance, collectives.group, collectives.step])[:, rows], axis=1)
        known = finite_median(np.unique(pack(messages[1], messages[2]), return_counts=True)[1].astype(np.float64))
    return (max(1, round(known)), None) if known else (None, NO_MESSAGES)


def _links(frame: Frame) -> dict[int, tuple[int, int]]:
    """Stages of the sender and the receiver of each group of two, by its place in Collectives.groups."""
    stage = dict(zip(frame.topology.ranks.tolist(), frame.topology.stage, strict=True))
    found = {}
    for place, name in enumerate(frame.collectives.groups):
        source, _, target = name.partition(":")[2].partition("-")
        if source.isdigit() and target.isdigit():
            ends = stage.get(int(source)), stage.get(int(target))
            if ends[0] is not None and ends[1] is not None:
                found[place] = ends[0], ends[1]
    return found


def _idle_share(frame: Frame, tables: Tables, steps: Ints) -> float | None:
    """What ranks wait for other stages, of the time of their passes.

    That is in messages between stages, and once the last micro-batch is done in the first collective that all stages
    meet in. The passes do not count the reduction of gradients.
    """
    walls = [frame.phase[name] for name in PASS if name in frame.phase]
    waited = frame.wait.get("pp")
    if not walls or waited is None or not len(frame.collectives):
        return None
    tail, aside = _tail(frame), _reduced(frame, tables)
    idle = np.nan_to_num(waited) + tail
    whole = np.sum([np.nan_to_num(wall) for wall in walls], axis=0) + tail - aside
    known = np.isfinite(frame.duration[steps]) & np.isfinite(waited[steps]) & (whole[steps] > 0)
    if not known.any():
        return None
    return float(idle[steps][known].sum() / whole[steps][known].sum())


def _tail(frame: Frame) -> Floats:
    """Seconds that each rank waits, after its last message between stages, where ranks of all stages meet [steps, ranks]."""
    collectives, ranks = frame.collectives, frame.shape[1]
    place = np.arange(len(collectives))
    chain = collectives.step * ranks + collectives.row
    last = np.full(frame.shape[0] * ranks, -1)
    between = collectives.kind == collectives.kinds.index("pp")
    np.maximum.at(last, chain[between], place[between])
    after = (last[chain] >= 0) & (place > last[chain]) & _of_all_stages(frame)[collectives.group]
    first = np.full(frame.shape[0] * ranks, len(collectives))
    np.minimum.at(first, chain[after], place[after])
    met = first < len(collectives)
    result = np.zeros(frame.shape[0] * ranks)
    result[met] = frame.pieces.wait[first[met]]
    return result.reshape(frame.shape)


def _of_all_stages(frame: Frame) -> Array:
    """Whether a group has ranks of every stage, and is none in which stages hand over [groups]."""
    topology = frame.topology
    stage = dict(zip(topology.ranks.tolist(), topology.stage, strict=True))
    every = {number for number in topology.stage if number is not None}
    found = [
        not name.startswith("pp") and {stage.get(rank) for rank in topology.members_of(name)} >= every
        for name in frame.collectives.groups
    ]
    return np.array(found, bool)


def _reduced(frame: Frame, tables: Tables) -> Floats:
    """Seconds of the passes in which gradients are reduced [steps, ranks]."""
    collectives = frame.collectives
    result = np.zeros(frame.shape)
    if "dp" in collectives.kinds:
        mine = collectives.kind == collectives.kinds.index("dp")
        mine &= np.isin(collectives.phase, [tables.code(name) for name in PASS])
        np.add.at(result, (collectives.step[mine], collectives.row[mine]), frame.pieces.length[mine])
    return result
