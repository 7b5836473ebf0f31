"""What is particular to x86-64: registers, how a function is called, how the kernel is asked.

Another architecture is another file with the same names.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

REGISTER_SET = 1
"""NT_PRSTATUS, the integer registers."""
VECTOR_SET = 0x202
"""NT_X86_XSTATE, all others."""
REGISTER_BYTES, VECTOR_BYTES = 216, 16384
SYSCALL = b"\x0f\x05"
MMAP, MUNMAP, FUTEX = 9, 11, 202
_NAMES = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi", "orig_rax",
    "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip
"""In the order of the kernel's struct user_regs_struct."""
_LAYOUT = struct.Struct(f"<{len(_NAMES)}Q")
_MASK = (1 << 64) - 1
_NO_RESTART = _MASK
"""An orig_rax that tells the kernel that no system call was interrupted here."""
_RED_ZONE = 128
_TRAP_AND_DIRECTION = 0x500
_EINTR = 4
_RESTARTS = range(-516, -511)
"""Results by which the kernel marks a system call that it would start again: ERESTART…"""

Registers = dict[str, int]


def unpack(raw: bytes) -> Registers:
    """Registers by name."""
    return dict(zip(_NAMES, _LAYOUT.unpack_from(raw), strict=True))


def pack(registers: Mapping[str, int]) -> bytes:
    """The kernel's form of registers."""
    return _LAYOUT.pack(*(registers[name] & _MASK for name in _NAMES))


def at_syscall(now: Registers, instruction: int, number: int, *arguments: int) -> Registers:
    """Registers that make the thread ask the kernel by the instruction at this address."""
    places = dict(zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False))
    return {**now, **places, "rip": instruction, "rax": number, "orig_rax": _NO_RESTART}


def at_call(now: Registers, function: int, stack: int, *arguments: int) -> Registers:
    """Registers as they are on entry to a function; its return address must lie at `stack`."""
    places = dict(zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), arguments, strict=False))
    flags = now["eflags"] & ~_TRAP_AND_DIRECTION
    return {**now, **places, "rip": function, "rsp": stack, "rax": 0, "orig_rax": _NO_RESTART, "eflags": flags}


def stack_for_call(now: Registers) -> int:
    """Where a return address may be put: below what the interrupted function uses, aligned as after a call."""
    return ((now["rsp"] - 2 * _RED_ZONE) & ~0xF) - 8


def result(now: Registers) -> int:
    """What a system call or a function returned, as a signed number."""
    value = now["rax"]
    return value - (1 << 64) if value >> 63 else value


def instruction(now: Registers) -> int:
    """Where the thread is."""
    return now["rip"]


def interrupted_futex(now: Registers) -> Registers | None:
    """Registers that let a wait for a lock, which the stop interrupted, return EINTR; None outside of such a wait."""
    if now["orig_rax"] != FUTEX or result(now) not in _RESTARTS:
        return None
    return {**now, "rax": -_EINTR, "orig_rax": _NO_RESTART}
