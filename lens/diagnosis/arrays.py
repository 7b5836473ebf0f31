"""Small array tools: packed sort keys, medians that skip what is absent, medians of everybody else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Array = NDArray[Any]

_ROOM = 2**62
MANY = 64
"""Among so many, one entry more or less does not move the median."""


def pack(*columns: Array) -> Ints:
    """One int64 a row that sorts as the columns do together, the first column weighing most."""
    key = np.zeros(len(columns[0]), np.int64)
    if not len(key):
        return key
    room = 1
    for column in columns:
        low, high = int(column.min()), int(column.max())
        width = high - low + 1
        if room * width >= _ROOM:
            # Too wide for the bits that are left: ranks of the values sort the same and are never more than rows.
            key = np.unique(key, return_inverse=True)[1].astype(np.int64)
            room = int(key.max()) + 1
            if room * width >= _ROOM:
                column = np.unique(column, return_inverse=True)[1]
                low, width = 0, int(column.max()) + 1
        key = key * width + (column.astype(np.int64) - low)
        room *= width
    return key


def starts_of(sorted_keys: Array) -> Ints:
    """Where each run of equal keys begins."""
    if not len(sorted_keys):
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])


def median(values: Floats, axis: int = 0) -> Floats:
    """Median along an axis; NaN entries do not count, a slice of nothing but NaN gives NaN."""
    if values.shape[axis] == 0:
        return np.full(np.delete(values.shape, axis), np.nan)
    # Sorting along contiguous memory is several times faster than across it.
    ordered = np.array(np.moveaxis(values, axis, -1), np.float64, order="C", copy=True)
    ordered.sort(axis=-1)
    count = np.isfinite(ordered).sum(axis=-1, keepdims=True)
    upper = np.minimum(count // 2, ordered.shape[-1] - 1)
    lower = np.maximum((count - 1) // 2, 0)
    middle = np.take_along_axis(ordered, lower, -1) + np.take_along_axis(ordered, upper, -1)
    result: Floats = np.where(count > 0, middle / 2, np.nan)[..., 0]
    return result


def cells(values: Floats, rows: Array, columns: Array | Sequence[int]) -> Floats:
    """The part of a table in these rows and columns [rows, columns]."""
    result: Floats = values[np.ix_(rows, np.asarray(columns, np.int64))]
    return result


def mean(values: Floats, axis: int = 0) -> Floats:
    """Mean along an axis; NaN entries do not count, a slice of nothing but NaN gives NaN."""
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    result: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return result


def spread(values: Floats, axis: int = 0) -> Floats:
    """Robust standard deviation around the median along an axis (scaled median absolute deviation)."""
    centre = np.expand_dims(median(values, axis), axis)
    return 1.4826 * median(np.abs(values - centre), axis)


def median_of_others(values: Floats) -> Floats:
    """For each entry of [rows, members] the median of the other finite members of its row; alone: NaN."""
    rows, members = values.shape
    if members >= MANY:
        return np.broadcast_to(median(values, axis=1)[:, None], values.shape)
    order = np.argsort(values, axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(members), (rows, members)), axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    count = np.isfinite(values).sum(axis=1, keepdims=True)
    # Without the entry itself count - 1 are left; those above its place move down by one.
    own_counts = np.isfinite(values)
    left = np.where(own_counts, count - 1, count)
    lower, upper = np.maximum((left - 1) // 2, 0), left // 2
    shift_lower = own_counts & (lower >= place)
    shift_upper = own_counts & (upper >= place)
    last = members - 1
    low = np.take_along_axis(ordered, np.minimum(lower + shift_lower, last), axis=1)
    high = np.take_along_axis(ordered, np.minimum(upper + shift_upper, last), axis=1)
    return np.where(left > 0, (low + high) / 2, np.nan)


def finite_mean(values: Floats) -> float | None:
    """Mean of the finite entries, None without any."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def finite_median(values: Floats) -> float | None:
    """Median of the finite entries, None without any."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None
