"""One thread of another process, stopped for a moment. The others run on."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import time
from signal import SIGTRAP
from types import TracebackType

from lens.attach import x86_64 as machine

_SEIZE, _INTERRUPT, _CONTINUE, _SINGLE_STEP, _DETACH = 0x4206, 0x4207, 7, 9, 17
_GET_REGISTERS, _SET_REGISTERS = 0x4204, 0x4205
_EVENT_STOP = 128
_ALL_THREADS = 0x40000000
_MOST_SIGNALS = 100
_LOOK_AGAIN_S = 20e-6
_LONGEST_LOOK_S = 0.02
_SOON_S = 1.0
"""Who has not stopped by then is not let run, and is looked at less often: we may run before all others."""
_FORBIDDEN = (
    "the kernel does not let us trace it: something else does at this moment, or a seccomp filter or security module "
    "forbids it; in a container: --cap-add SYS_PTRACE --security-opt seccomp=unconfined"
)
"""What no file shows beforehand."""


class TraceError(Exception):
    """The kernel refused, the target ended, or it did not stop in time."""


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _library() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return libc


class StoppedThread:
    """A thread from `seize` and stop to detach. What it was sent meanwhile by others is sent again at the end.

    Args:
        thread: its number.
        patience_s: longest wait until it stops at first, while this process itself runs. Later stops are waited for as
            long as it lives: whoever gave up then would let it run on in a state that is not its own.
    """

    def __init__(self, thread: int, patience_s: float) -> None:
        self._thread = thread
        self._patience_s = patience_s
        self._libc = _library()
        self._signals: list[int] = []

    def __enter__(self) -> StoppedThread:
        self._ask(_SEIZE)
        try:
            self._ask(_INTERRUPT)
            signal, event = self._wait(self._patience_s)
            while event != _EVENT_STOP:
                if event == 0:
                    self._signals.append(signal)
                self._ask(_CONTINUE)
                signal, event = self._wait(self._patience_s)
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()

    def registers(self) -> machine.Registers:
        """The integer registers."""
        return machine.unpack(self.read_set(machine.REGISTER_SET, machine.REGISTER_BYTES))

    def set_registers(self, registers: machine.Registers) -> None:
        """Put registers in place."""
        self.write_set(machine.REGISTER_SET, machine.pack(registers))

    def read_set(self, kind: int, size: int) -> bytes:
        """A register set as the kernel gives it."""
        buffer = ctypes.create_string_buffer(size)
        vector = _Vector(ctypes.cast(buffer, ctypes.c_void_p), size)
        self._ask(_GET_REGISTERS, kind, ctypes.addressof(vector))
        return buffer.raw[: vector.length]

    def write_set(self, kind: int, content: bytes) -> None:
        """Put a register set back."""
        buffer = ctypes.create_string_buffer(content, len(content))
        vector = _Vector(ctypes.cast(buffer, ctypes.c_void_p), len(content))
        self._ask(_SET_REGISTERS, kind, ctypes.addressof(vector))

    def single_step(self) -> None:
        """Run one instruction.

        Raises:
            TraceError: it was sent signals all the time, and never came to it.
        """
        for _ in range(_MOST_SIGNALS):
            self._ask(_SINGLE_STEP)
            stopped = self._wait()
            if stopped == (SIGTRAP, 0):
                return
            # A signal that came meanwhile is told first: the instruction has not run yet.
            if stopped[1] == 0:
                self._signals.append(stopped[0])
        raise TraceError("the target is sent signals all the time")

    def run_to_signal(self) -> int:
        """Run until a signal arrives; which one."""
        self._ask(_CONTINUE)
        return self._wait()[0]

    def keep_signal(self, signal: int) -> None:
        """A signal that is not ours: the thread gets it at the end."""
        self._signals.append(signal)

    def _ask(self, request: int, address: int = 0, data: int = 0) -> None:
        ctypes.set_errno(0)
        if self._libc.ptrace(request, self._thread, address, data) == -1 and (number := ctypes.get_errno()):
            if request == _SEIZE and number == errno.EPERM:
                raise TraceError(_FORBIDDEN)
            raise TraceError(f"the kernel refused (ptrace {request:#x}: {os.strerror(number)})")

    def _wait(self, patience_s: float = math.inf) -> tuple[int, int]:
        """The signal and event of the next stop."""
        waited, last = 0.0, time.monotonic()
        while True:
            found, status = os.waitpid(self._thread, os.WNOHANG | _ALL_THREADS)
            if found:
                if os.WIFSTOPPED(status):
                    return (status >> 8) & 0xFF, status >> 16
                raise TraceError("the target ended")
            now = time.monotonic()
            # While the machine let us stand, it may have let the target stand too: that is no waiting for a stop.
            waited, last = waited + min(now - last, _LONGEST_LOOK_S), now
            if waited > patience_s:
                raise TraceError(f"the target did not stop within {patience_s:g} s")
            time.sleep(_LOOK_AGAIN_S if waited < _SOON_S else _LONGEST_LOOK_S)

    def _detach(self) -> None:
        first, rest = (self._signals[0], self._signals[1:]) if self._signals else (0, [])
        self._libc.ptrace(_DETACH, self._thread, 0, first)
        for signal in rest:
            os.kill(self._thread, signal)
