"""What the log's entries hold: a run's description, a batch as it came, or the cut of a group.

A batch is kept as it was sent, still packed: decoding gives the same rows again after a crash.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Any

RUN, BATCH, CUT = 1, 2, 3
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class RunEntry:
    """What somebody said about a run; `number` is the store's own short name for it."""

    number: int
    received_ns: int
    described: dict[str, Any]

    def pack(self) -> bytes:
        """The entry's payload."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> RunEntry:
        """The entry of a payload."""
        return cls(**json.loads(payload))


@dataclass(frozen=True)
class BatchEntry:
    """A batch of records of one run; source and sequence are None for a sender that named none."""

    number: int
    received_ns: int
    content_type: str
    encoding: str
    source: str | None
    sequence: int | None
    body: bytes
    refused: tuple[int, ...] = ()
    """Series of it that were not taken, by their mid: the run had too many (see `cardinality`)."""

    def pack(self) -> bytes:
        """The entry's payload."""
        # `refused` only where there is any: an older lens can read all other entries.
        head = {key: value for key, value in vars(self).items() if key != "body" and value != ()}
        packed = json.dumps(head, separators=(",", ":")).encode()
        return b"".join((_LENGTH.pack(len(packed)), packed, self.body))

    @classmethod
    def unpack(cls, payload: bytes) -> BatchEntry:
        """The entry of a payload."""
        (length,) = _LENGTH.unpack_from(payload)
        head = json.loads(payload[_LENGTH.size : _LENGTH.size + length])
        refused = tuple(head.pop("refused", ()))
        return cls(**head, body=payload[_LENGTH.size + length :], refused=refused)


@dataclass(frozen=True)
class Cut:
    """The entries from `start` to `end` go into the database together.

    `blocks` is the number of the newest block of every table before that: a table whose newest block has a higher
    number holds the group's rows already.
    """

    start: int
    end: int
    blocks: dict[str, int]

    def pack(self) -> bytes:
        """The entry's payload."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Cut:
        """The entry of a payload."""
        return cls(**json.loads(payload))
