"""Unpacks request bodies, and stops at a limit: a few kilobytes can unpack to terabytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from lens.store.errors import TooLargeError, UndecodableError

_BITE = 1024
"""Bytes of zstd unpacked in one call: four of them can stand for 128 KiB."""


def unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its content encoding, at most `limit` bytes of it.

    Raises:
        UndecodableError: an unknown encoding, or bytes that are not of it.
        TooLargeError: it unpacks to more than the limit.
    """
    name = encoding.strip().lower() or "identity"
    unpacker = _UNPACKERS.get(name)
    if unpacker is None:
        raise UndecodableError(f"content encoding {encoding!r} is not known", "use gzip, zstd or none")
    data = unpacker(body, limit)
    if len(data) > limit:
        raise TooLargeError(f"the body unpacks to more than {limit >> 20} MiB", "send it in smaller batches")
    return data


def _identity(body: bytes, limit: int) -> bytes:
    return body


def _gzip(body: bytes, limit: int) -> bytes:
    parts: list[bytes] = []
    size, rest = 0, body
    while rest:
        unpacker = zlib.decompressobj(wbits=31)
        try:
            part = unpacker.decompress(rest, limit - size + 1)
        except zlib.error as error:
            raise UndecodableError(f"the body is not gzip: {error}", "check Content-Encoding") from error
        parts.append(part)
        size += len(part)
        if size > limit:
            break
        if not unpacker.eof:
            raise UndecodableError("the gzip body is cut short", "send the whole body")
        rest = unpacker.unused_data.lstrip(b"\0")
    return b"".join(parts)


def _zstd(body: bytes, limit: int) -> bytes:
    import zstandard

    parts: list[bytes] = []
    size, rest = 0, body
    while rest:
        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        position = 0
        try:
            while position < len(rest) and not unpacker.eof and size <= limit:
                bite = rest[position : position + _BITE]
                part = unpacker.decompress(bite)
                position += len(bite)
                parts.append(part)
                size += len(part)
        except zstandard.ZstdError as error:
            raise UndecodableError(f"the body is not zstd: {error}", "check Content-Encoding") from error
        if size > limit:
            break
        if not unpacker.eof:
            raise UndecodableError("the zstd body is cut short", "send the whole body")
        rest = unpacker.unused_data + rest[position:]
    return b"".join(parts)


_UNPACKERS: dict[str, Callable[[bytes, int], bytes]] = {
    "identity": _identity,
    "gzip": _gzip,
    "x-gzip": _gzip,
    "zstd": _zstd,
}
