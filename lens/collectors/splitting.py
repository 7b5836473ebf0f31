"""Halving a batch of slots that a server finds too large.

A piece is named by a path of halves: "0" is the first half, "01" its second half. The same batch and path always
give the same bytes, so a piece that is sent again is known again.
"""

from __future__ import annotations

import struct

from lens.slots import SLOT_BYTES, RingPart, decode_batch, encode_batch

_HEAD = struct.Struct("<2q")


def piece_of(body: bytes, path: str) -> bytes:
    """The piece of an (uncompressed) batch at this path.

    Raises:
        ValueError: the batch cannot be halved that often.
    """
    for side in path:
        halves = halve(body)
        if halves is None:
            raise ValueError(f"no piece {path} in this batch")
        body = halves[int(side)]
    return body


def halve(body: bytes) -> tuple[bytes, bytes] | None:
    """Two batches that together hold the records of one; None when it holds a single record."""
    batch = decode_batch(body)
    total = sum(part.count for part in batch.rings)
    first: list[RingPart] = []
    second: list[RingPart] = []
    room = total // 2
    for part in batch.rings:
        if room >= part.count:
            first.append(part)
            room -= part.count
            continue
        cut = _cut(part, room, bool(first))
        room = 0
        if cut:
            head = part.slots[: cut * SLOT_BYTES]
            first.append(RingPart(part.about, part.strings, head, part.first, part.lost, part.open))
        if cut < part.count:
            rest = part.slots[cut * SLOT_BYTES :]
            lost, spans = (0, []) if cut else (part.lost, part.open)
            second.append(RingPart(part.about, part.strings, rest, part.first + cut, lost, spans))
    if not first or not second:
        return None
    return encode_batch(batch.host, batch.anchor, first), encode_batch(batch.host, batch.anchor, second)


def _cut(part: RingPart, wanted: int, may_be_none: bool) -> int:
    """How many slots of a part go into the first half: about `wanted`, whole records, and if it can be not all."""
    start = end = 0
    while end < wanted:
        start, end = end, end + 1 + (_HEAD.unpack_from(part.slots, end * SLOT_BYTES)[1] >> 8 & 0xFFFFFF)
    if end == part.count and (start or may_be_none):
        return start
    return end
