"""Symbols and machine code of ELF files: where a function of a running process lies.

Source of the layout: the System V ABI's ELF-64 object file format.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"\x7fELF\x02\x01"
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SYMBOL_TABLES = (2, 11)
_LOADED, _EXECUTABLE = 1, 1
_PAGE_MASK = ~0xFFF


class ElfError(Exception):
    """A file that is no ELF file of 64 bits, or is cut off."""


@dataclass(frozen=True)
class ElfFile:
    """What attaching needs of a file. Addresses are relative to where the file's first byte is mapped."""

    symbols: Mapping[str, int]
    """Address by name, of the names asked for that are defined here."""
    code: tuple[tuple[int, bytes], ...]
    """Executable parts: address of the first byte, and the bytes."""

    def find_code(self, instruction: bytes) -> int | None:
        """Address of the first place where these bytes stand in executable memory."""
        for address, content in self.code:
            place = content.find(instruction)
            if place >= 0:
                return address + place
        return None


def read(path: Path, names: Collection[str] = ()) -> ElfFile:
    """Read the symbols of these names, and the code.

    Raises:
        ElfError: the file cannot be understood.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if data[:6] != _MAGIC:
        raise ElfError(f"{path} is not a 64-bit ELF file")
    try:
        return _parse(data, names)
    except (struct.error, IndexError, ValueError) as error:
        raise ElfError(f"{path} is damaged ({error})") from error


def _parse(data: bytes, names: Collection[str]) -> ElfFile:
    (segments_at, sections_at) = struct.unpack_from("<QQ", data, 0x20)
    (segment_bytes, segments, section_bytes, sections) = struct.unpack_from("<HHHH", data, 0x36)
    base: int | None = None
    code = []
    for number in range(segments):
        kind, flags, offset, address, _, size, _, _ = _SEGMENT.unpack_from(
            data, segments_at + number * segment_bytes
        )
        if kind != _LOADED:
            continue
        base = address & _PAGE_MASK if base is None else base
        if flags & _EXECUTABLE:
            code.append((address - base, data[offset : offset + size]))
    base = base or 0
    table = [_SECTION.unpack_from(data, sections_at + number * section_bytes) for number in range(sections)]
    found = {}
    for section in table:
        if names and section[1] in _SYMBOL_TABLES:
            strings = table[section[6]]
            found.update(_symbols(data, section, data[strings[4] : strings[4] + strings[5]], names))
    return ElfFile({name: value - base for name, value in found.items()}, tuple(code))


def _symbols(data: bytes, section: tuple[int, ...], strings: bytes, names: Collection[str]) -> dict[str, int]:
    wanted = {name.encode() for name in names}
    found = {}
    for place in range(section[4], section[4] + section[5], _SYMBOL.size):
        name_at, _, _, defined_in, value, _ = _SYMBOL.unpack_from(data, place)
        if defined_in and name_at:
            name = strings[name_at : strings.index(b"\0", name_at)]
            if name in wanted:
                found[name.decode()] = value
    return found
