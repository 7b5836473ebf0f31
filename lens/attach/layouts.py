"""Where CPython keeps what is needed to read a stack: offsets within its structures, in bytes, of 64-bit builds.

Source: the headers under `Include/internal` and `Include/cpython` of each version. They are the same in all releases of
one minor version. Builds without the global lock lay their objects out differently and are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """One minor version of CPython."""

    interpreters: int
    """_PyRuntimeState.interpreters.head"""
    main_thread: int
    """_PyRuntimeState.main_thread, as pthread_self gives it"""
    threads: int
    """PyInterpreterState.threads.head"""
    pthread: int
    """PyThreadState.thread_id"""
    native: int | None
    """PyThreadState.native_thread_id"""
    frame: tuple[int, ...]
    """From a PyThreadState to its innermost frame: offsets of the pointers to follow."""
    code: int
    previous: int
    instruction: int
    """Within a frame: its code, the frame that called it, the instruction that it is at."""
    first_instruction: int | None
    """PyCodeObject.co_code_adaptive; None where a frame keeps the instruction's number, not its address"""
    file: int
    name: int
    first_line: int
    lines: int
    """PyCodeObject.co_filename, co_qualname (before 3.11: co_name), co_firstlineno, co_linetable"""
    ascii: int
    wide: int
    """Where the characters of a str begin that is ASCII, or is not"""


NEXT_THREAD, INTERPRETER = 8, 16
"""PyThreadState.next and .interp, in all of them."""
TYPE, LENGTH, STATE, BYTES = 8, 16, 32, 32
"""PyObject.ob_type, the length of a str or of bytes, PyASCIIObject.state, PyBytesObject.ob_sval."""

LAYOUTS: Mapping[tuple[int, int], Layout] = {
    (3, 10): Layout(
        interpreters=32, main_thread=72, threads=8, pthread=176, native=None, frame=(24,), code=32, previous=24,
        instruction=96, first_instruction=None, file=104, name=112, first_line=40, lines=120, ascii=48, wide=72,
    ),
    (3, 11): Layout(
        interpreters=40, main_thread=80, threads=16, pthread=152, native=160, frame=(56, 8), code=32, previous=48,
        instruction=56, first_instruction=184, file=112, name=128, first_line=72, lines=136, ascii=48, wide=72,
    ),
    (3, 12): Layout(
        interpreters=40, main_thread=64, threads=72, pthread=136, native=144, frame=(56, 0), code=0, previous=8,
        instruction=56, first_instruction=192, file=112, name=128, first_line=68, lines=136, ascii=40, wide=56,
    ),
    (3, 13): Layout(
        interpreters=632, main_thread=656, threads=7344, pthread=152, native=160, frame=(72,), code=0, previous=8,
        instruction=56, first_instruction=200, file=112, name=128, first_line=68, lines=136, ascii=40, wide=56,
    ),
}  # fmt: skip
