"""The parts of the step whose self times are watched, rank by rank."""

from __future__ import annotations

import numpy as np

from lens.diagnosis.arrays import Floats
from lens.diagnosis.decompose import APART_PHASES, COMPUTE_PHASES, COPY_PHASES, LOADING_PHASES, SECONDS, Frame
from lens.slots import NULL

WITHIN = {"optimizer": "compute"}
"""Parts that are watched by themselves too, each with the part that it lies in: noise grows with the length of what it
disturbs, so what is new in a short part is seen long before it shows in the whole."""


def parts_within(frame: Frame) -> dict[str, Floats]:
    """The self times of `WITHIN` that are known apart from the rest of their part."""
    if not len(frame.collectives) and not frame.wait:
        return {}
    return {name: frame.own[name] for name in WITHIN if name in frame.own}


def parts_of_step(frame: Frame) -> dict[str, Floats]:
    """The self times that are watched: compute, data, h2d (copies to the card) and host (what lies between phases and
    steps)."""
    parts: dict[str, Floats] = {}
    compute, data = frame.own_sum(COMPUTE_PHASES), frame.own_sum(LOADING_PHASES)
    watched = (*COMPUTE_PHASES, *LOADING_PHASES, *COPY_PHASES, *APART_PHASES)
    named = [name for name in frame.own if name not in watched]
    if not len(frame.collectives) and not frame.wait:
        # Without collectives nobody can tell computing from waiting in backward; forward is mostly the rank's own.
        compute = frame.own.get("forward", compute)
    if data is not None:
        parts["data"] = data
    copies = frame.own_sum(COPY_PHASES)
    if copies is not None:
        parts["h2d"] = copies
    rest = frame.self_time - sum((np.nan_to_num(own) for own in frame.own.values()), np.zeros(frame.shape))
    rest = np.maximum(rest, 0) + _gaps(frame)
    rest = rest + sum((np.nan_to_num(frame.own[name]) for name in named), np.zeros(frame.shape))
    if compute is None:
        apart = [np.nan_to_num(own) for name, own in frame.own.items()]
        compute = frame.self_time - sum(apart, np.zeros(frame.shape))
    else:
        parts["host"] = rest
    parts["compute"] = compute
    return dict(sorted(parts.items()))


def _gaps(frame: Frame) -> Floats:
    """Seconds between the end of the step before and the start of each step; 0 where one is missing."""
    gaps = np.zeros(frame.shape)
    if frame.shape[0] > 1:
        known = (frame.start_ns[1:] != NULL) & (frame.end_ns[:-1] != NULL)
        known &= (np.diff(frame.timeline.steps) == 1)[:, None]
        gaps[1:][known] = (frame.start_ns[1:][known] - frame.end_ns[:-1][known]) * SECONDS
    return np.maximum(gaps, 0)
