"""The slot: 16 little-endian int64 words that hold one record, and the frame in which agents ship slots.

A slot is written by the recorder, read by the agent, shipped as it is, and turned into columns by the server.
Nothing in between decodes it. Standard library only.

| word | holds |
|---|---|
| 0 | sequence, from 1, grows by one each slot |
| 1 | type · continuation count << 8 · rank field << 32 (0 the ring's own rank, 1 null, r + 2 rank r) |
| 2, 3 | t0, t1: CLOCK_MONOTONIC ns (events keep their severity in word 3) |
| 4 | step, or NULL |
| 5 | two string ids: low · high << 32 (0 none) |
| 6 … 14 | payload of the type |
| 15 | the sequence again, written last; negative in a continuation slot |

A record longer than its slot goes on in continuation slots: words 1 … 14 are payload there. The sign of word 15
lets a reader that was lapped find the next beginning of a record.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

WORDS = 16
SLOT_BYTES = WORDS * 8
NULL = -(2**63)
"""What an absent int64 looks like, in slots and in columns."""

STEP, PHASE, COLLECTIVE, SPAN, ROW, VECTOR, EVENT = 1, 2, 3, 4, 5, 6, 7
FIRST_PAYLOAD_WORDS, NEXT_PAYLOAD_WORDS = 8, 14
OWN_RANK, NO_RANK = 0, 1
SEVERITIES = ("info", "warning", "error")
COLUMN_SEPARATOR, LABEL_SEPARATOR = "\x1f", "\x1e"
STEP_WORDS = ("tokens", "micro_batches", "seq_sq", "recompiles", "gc_ns", "log_ns", "overhead_ns")

MAGIC = b"LENSSLT1"
CONTENT_TYPE = "application/vnd.lens.slots"
_LENGTH = struct.Struct("<I")
_SLOT = struct.Struct("<16q")
_LOW = (1 << 32) - 1


class SlotError(ValueError):
    """A batch of slots cannot be read; the message says where it breaks."""


def rank_field(rank: int | None) -> int:
    """How a rank stands in word 1: null is 1, rank r is r + 2."""
    return NO_RANK if rank is None else rank + 2


def continuations(payload_words: int) -> int:
    """Continuation slots needed for a payload of so many 8-byte words."""
    return max(0, -(-(payload_words - FIRST_PAYLOAD_WORDS) // NEXT_PAYLOAD_WORDS))


def series_key(metric: str, labels: dict[str, str] | None = None) -> str:
    """A column's name in a ROW: the metric, with its labels as canonical JSON when it has some."""
    return metric + LABEL_SEPARATOR + canonical(labels) if labels else metric


def canonical(labels: dict[str, str]) -> str:
    """Labels as sorted, compact JSON: equal labels are equal strings."""
    return json.dumps(labels, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class Anchor:
    """Two clocks read at one moment; turns a ring's monotonic times into Unix times."""

    monotonic_ns: int
    unix_ns: int
    error_ns: int = 0

    def unix(self, monotonic_ns: int) -> int:
        """Unix time, ns, of a monotonic time."""
        return monotonic_ns - self.monotonic_ns + self.unix_ns


@dataclass
class RingPart:
    """Slots of one ring in the order written, with the strings they refer to."""

    about: dict[str, Any]
    strings: list[str]
    slots: bytes
    first: int
    """Sequence of the first slot."""
    lost: int = 0
    """Slots overwritten before they could be read, since the part before."""
    open: list[dict[str, Any]] = field(default_factory=list)
    """Spans not left yet at the time of reading: kind, name, t0, step and, for collectives, group, seq, bytes."""

    @property
    def count(self) -> int:
        """Number of slots."""
        return len(self.slots) // SLOT_BYTES


@dataclass
class Batch:
    """What an agent ships at once: one host, one clock anchor, parts of several rings."""

    host: str
    anchor: Anchor
    rings: list[RingPart]


def encode_batch(host: str, anchor: Anchor, rings: Iterable[RingPart]) -> bytes:
    """The bytes of a batch: magic, JSON header, then strings and slots of each ring."""
    heads: list[dict[str, Any]] = []
    bodies: list[bytes] = []
    for part in rings:
        strings = json.dumps(part.strings, ensure_ascii=False, separators=(",", ":")).encode()
        heads.append(
            {
                "about": part.about,
                "first": part.first,
                "lost": part.lost,
                "open": part.open,
                "strings": len(strings),
                "slots": len(part.slots),
            }
        )
        bodies += [strings, part.slots]
    header = json.dumps(
        {
            "host": host,
            "anchor": [anchor.monotonic_ns, anchor.unix_ns, anchor.error_ns],
            "rings": heads,
        },
        separators=(",", ":"),
    ).encode()
    return b"".join([MAGIC, _LENGTH.pack(len(header)), header, *bodies])


def decode_batch(body: bytes) -> Batch:
    """The batch in these bytes.

    Raises:
        SlotError: wrong magic, truncated, or a header that is not what this version writes.
    """
    if body[: len(MAGIC)] != MAGIC:
        raise SlotError("not a batch of slots of version 1 (wrong first bytes)")
    try:
        (length,) = _LENGTH.unpack_from(body, len(MAGIC))
        at = len(MAGIC) + _LENGTH.size
        header = json.loads(body[at : at + length])
        at += length
        parts = []
        for head in header["rings"]:
            strings_end = at + _size(head, "strings")
            slots_end = strings_end + _size(head, "slots")
            if slots_end > len(body) or head["slots"] % SLOT_BYTES:
                raise SlotError("the batch is truncated")
            strings = json.loads(body[at:strings_end])
            if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
                raise SlotError("the strings of a ring are not a list of text")
            if not isinstance(head["about"], dict) or not isinstance(head["open"], list):
                raise SlotError("a ring's description is not an object")
            parts.append(
                RingPart(
                    head["about"],
                    strings,
                    body[strings_end:slots_end],
                    int(head["first"]),
                    int(head["lost"]),
                    head["open"],
                )
            )
            at = slots_end
        monotonic, unix, error = header["anchor"]
        return Batch(str(header["host"]), Anchor(int(monotonic), int(unix), int(error)), parts)
    except SlotError:
        raise
    except (KeyError, TypeError, ValueError, struct.error, RecursionError) as error:
        raise SlotError(f"the batch's header cannot be read: {error}") from error


def _size(head: dict[str, Any], key: str) -> int:
    size = int(head[key])
    if size < 0:
        raise SlotError("a negative size")
    return size


def iter_records(part: RingPart) -> Iterator[dict[str, Any]]:
    """The part's slots as plain dicts, in pure Python: for the simulator and the post-mortem, not for shipping.

    Times stay CLOCK_MONOTONIC ns. Keys: type, t0, t1, step, rank and what the type holds.
    """
    own_rank = part.about.get("rank")
    slots, total, index = part.slots, part.count, 0
    while index < total:
        words = _SLOT.unpack_from(slots, index * SLOT_BYTES)
        kind, extra, rank_word = words[1] & 0xFF, words[1] >> 8 & 0xFFFFFF, words[1] >> 32
        if index + extra >= total:
            return
        payload = slots[index * SLOT_BYTES + 56 : index * SLOT_BYTES + 120]
        for more in range(index + 1, index + 1 + extra):
            payload += slots[more * SLOT_BYTES + 8 : more * SLOT_BYTES + 120]
        rank = own_rank if rank_word == OWN_RANK else None if rank_word == NO_RANK else rank_word - 2
        record = _RECORD_READERS[kind](words, payload, part.strings) if kind in _RECORD_READERS else None
        if record is not None:
            yield {"type": kind, "t0": words[2], "rank": rank, "step": known(words[4]), **record}
        index += 1 + extra


def known(word: int) -> int | None:
    """A word, or None where it says NULL."""
    return None if word == NULL else word


def _text(strings: list[str], index: int) -> str | None:
    return strings[index] if 0 < index < len(strings) else None


def _ids(words: tuple[int, ...], strings: list[str]) -> tuple[str | None, str | None]:
    return _text(strings, words[5] & _LOW), _text(strings, words[5] >> 32 & _LOW)


def _read_step(words: tuple[int, ...], payload: bytes, strings: list[str]) -> dict[str, Any]:
    return {"t1": known(words[3])} | {name: known(words[6 + i]) for i, name in enumerate(STEP_WORDS)}


def _read_phase(words: tuple[int, ...], payload: bytes, strings: list[str]) -> dict[str, Any]:
    return {"t1": known(words[3]), "name": _ids(words, strings)[0], "micro_batch": known(words[6])}


def _read_collective(words: tuple[int, ...], payload: bytes, strings: list[str]) -> dict[str, Any]:
    operation, group = _ids(words, strings)
    layer, micro_batch = words[11] & _LOW, words[11] >> 32 & _LOW
    peer, flags = words[12] & _LOW, words[12] >> 32
    return {
        "t1": known(words[3]),
        "name": operation,
        "group": group,
        "seq": known(words[6]),
        "bytes": known(words[7]),
        "t_wait": known(words[8]),
        "t_done": known(words[9]),
        "dtype": _text(strings, words[10] & _LOW),
        "phase": _text(strings, words[10] >> 32 & _LOW),
        "layer": layer - 1 if layer else None,
        "micro_batch": micro_batch - 1 if micro_batch else None,
        "peer": peer - 1 if peer else None,
        "async": bool(flags & 1),
    }


def _read_span(words: tuple[int, ...], payload: bytes, strings: list[str]) -> dict[str, Any]:
    name, kind = _ids(words, strings)
    return {"t1": known(words[3]), "name": name, "kind": kind, "attrs": _json(payload, words[6])}


def _read_row(words: tuple[int, ...], payload: bytes, strings: list[str]) -> dict[str, Any]:
    columns, device = _ids(words, strings)
    values = struct.unpack_from(f"<{words[6]}d", payload)
    names = (columns or "").split(COLUMN_SEPARATOR)
    return {"device": device, "values": dict(zip(names, values, strict=False))}


def _read_vector(words: tuple[int, ...], payload: bytes, strings: list[str]) -> dict[str, Any]:
    metric, labels = _ids(words, strings)
    layer = words[6] >> 32
    values = struct.unpack_from(f"<{words[6] & _LOW}d", payload)
    return {"metric": metric, "labels": labels, "layer": layer - 1 if layer else None, "values": values}


def _read_event(words: tuple[int, ...], payload: bytes, strings: list[str]) -> dict[str, Any]:
    kind, device = _ids(words, strings)
    body = _json(payload, words[6])
    return {
        "kind": kind,
        "device": device,
        "severity": SEVERITIES[words[3]] if 0 <= words[3] < 3 else "info",
        "text": body.get("text", ""),
        "attrs": body.get("attrs", {}),
    }


def _json(payload: bytes, length: int) -> dict[str, Any]:
    if length <= 0:
        return {}
    value = json.loads(payload[:length])
    return value if isinstance(value, dict) else {}


_RECORD_READERS = {
    STEP: _read_step,
    PHASE: _read_phase,
    COLLECTIVE: _read_collective,
    SPAN: _read_span,
    ROW: _read_row,
    VECTOR: _read_vector,
    EVENT: _read_event,
}
