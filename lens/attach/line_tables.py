"""The source line of an instruction, by the table that CPython compiles into a code object.

Sources: `Objects/lnotab_notes.txt` of CPython 3.10, `Objects/locations.md` of 3.11 and later.
"""

from __future__ import annotations

_NO_LINE_3_10 = -128
_NO_LOCATION, _LONG, _NO_COLUMN, _ONE_LINE = 15, 14, 13, 10


def line_of(version: tuple[int, int], table: bytes, first_line: int, offset: int) -> int | None:
    """Line of the instruction at this offset in bytes; None for one that belongs to no line.

    Raises:
        IndexError: the table is cut off.
    """
    if offset < 0:
        return first_line  # it has not begun its first instruction
    return (_pairs if version < (3, 11) else _locations)(table, first_line, offset)


def _pairs(table: bytes, line: int, offset: int) -> int | None:
    end = 0
    for place in range(0, len(table) - 1, 2):
        change = table[place + 1] - 256 if table[place + 1] > 127 else table[place + 1]
        end += table[place]
        if change != _NO_LINE_3_10:
            line += change
        if offset < end:
            return None if change == _NO_LINE_3_10 else line
    return None


def _locations(table: bytes, line: int, offset: int) -> int | None:
    end = place = 0
    while place < len(table):
        first = table[place]
        kind = first >> 3 & 15
        if kind in (_LONG, _NO_COLUMN):
            line += _signed(table, place + 1)
        elif _ONE_LINE <= kind < _NO_COLUMN:
            line += kind - _ONE_LINE
        end += 2 * ((first & 7) + 1)
        if offset < end:
            return None if kind == _NO_LOCATION else line
        place += 1
        while place < len(table) and not table[place] & 128:
            place += 1
    return None


def _signed(table: bytes, place: int) -> int:
    value = shift = 0
    while True:
        value |= (table[place] & 63) << shift
        if not table[place] & 64:
            return -(value >> 1) if value & 1 else value >> 1
        shift += 6
        place += 1
