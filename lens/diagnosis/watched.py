"""What of the transfers is watched for changes: streams against their class and their past, and ranks' totals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lens.diagnosis import changes, peers
from lens.diagnosis.arrays import Array, Floats, median
from lens.diagnosis.changes import Change
from lens.diagnosis.decompose import Frame
from lens.diagnosis.transfers import Transfers

FEWEST_ALIKE = 3
MOST_RANKS = 512
"""Above this, streams alone are watched: a rank's total says nothing that its streams do not."""
MOST_ALONE = 64
"""So many at most are watched against their own past alone; of more, the median of each class."""


@dataclass(frozen=True)
class Watched:
    """A change of what is watched: the streams that it stands for, and whether against their class."""

    change: Change
    streams: tuple[int, ...]
    relative: bool


def watch(frame: Frame, transfers: Transfers, usual: Floats) -> list[Watched]:
    """Changes of streams against their class and against their past, and of ranks' totals."""
    if not len(transfers):
        return []
    classes = [np.flatnonzero(transfers.alike == number) for number in np.unique(transfers.alike)]
    seconds, ranks = transfers.seconds, frame.shape[1]
    few = ranks <= MOST_RANKS
    totals = transfers.totals(ranks) if few else np.zeros((len(seconds), 0))
    of_rank = [tuple(transfers.of_rank(row).tolist()) for row in range(totals.shape[1])]
    everything = [*((place,) for place in range(len(transfers))), *of_rank]
    table = np.concatenate([seconds, totals], axis=1)
    alike = [members for members in classes if len(members) >= FEWEST_ALIKE]
    alike += [
        len(transfers) + members
        for members in peers.comparable(frame.topology)
        if few and len(members) >= FEWEST_ALIKE
    ]
    found = [
        Watched(change, everything[change.row], True)
        for change in _track(table, usual, alike)
    ]  # fmt: skip
    own: list[tuple[Floats, tuple[int, ...]]] = [
        (median(seconds[:, members], axis=1), tuple(members.tolist())) for members in classes
    ]
    if few and ranks:
        own.append((median(totals, axis=1), tuple(range(len(transfers)))))
    if len(transfers) <= MOST_ALONE:
        own += [(seconds[:, place], (place,)) for place in range(len(transfers))]
    if ranks <= MOST_ALONE:
        own += [(totals[:, row], of_rank[row]) for row in range(ranks)]
    alone = np.stack([values for values, _ in own], axis=1)
    found += [
        Watched(change, own[change.row][1], False)
        for change in _track(alone, usual, [np.array([place]) for place in range(len(own))])
    ]  # fmt: skip
    return found


def _track(values: Floats, usual: Floats, alike: list[Array]) -> list[Change]:
    """Changes of the columns that have somebody to compare with."""
    if not alike:
        return []
    columns = np.concatenate(alike)
    place = {int(column): number for number, column in enumerate(columns.tolist())}
    sets = [np.array([place[int(column)] for column in members]) for members in alike]
    found = changes.track(values[:, columns], usual, sets, True)
    return [Change(**{**change.__dict__, "row": int(columns[change.row])}) for change in found]
