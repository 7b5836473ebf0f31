"""Numbers that are still on an accelerator: copied beside the work in flight, read when they have arrived.

Reading them at once would make the training wait for the device, which a hook must never do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_MOST_WAITING = 4096
"""Copies not read yet; beyond, the device is far behind and the oldest are given up."""


class _Copy(NamedTuple):
    arrived: Any
    values: Any
    use: Callable[[list[float]], None]


class Later:
    """Copies on their way to the host, oldest first."""

    __slots__ = ("copies", "lost")

    def __init__(self) -> None:
        self.copies: deque[_Copy] = deque(maxlen=_MOST_WAITING)
        """Not read yet."""
        self.lost = 0
        """Copies given up."""

    def read(self, tensors: Sequence[Any], use: Callable[[list[float]], None]) -> None:
        """Call `use` at a later step with all numbers of these tensors of one device, one after the other."""
        import torch

        with torch.no_grad():
            numbers = torch.cat([tensor.detach().reshape(-1).to(torch.float64) for tensor in tensors])
            values, arrived = copy_to_host(numbers)
        self.lost += len(self.copies) == _MOST_WAITING
        self.copies.append(_Copy(arrived, values, use))

    def use_what_arrived(self) -> None:
        """Read the copies that have arrived; never waits."""
        while self.copies and self.copies[0].arrived.query():
            copy = self.copies.popleft()
            copy.use(copy.values.tolist())

    def use_all(self) -> None:
        """Wait for what is on its way: at the end, when there is no training left to hold up."""
        while self.copies:
            copy = self.copies.popleft()
            copy.arrived.synchronize()
            copy.use(copy.values.tolist())


def copy_to_host(numbers: Any) -> tuple[Any, Any]:
    """Start a copy that the device makes in its own time; returns it and the event that says it has arrived."""
    import torch

    values = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    values.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(numbers.device))
    return values, arrived


def is_on_device(value: Any) -> bool:
    """Whether reading this value would wait for an accelerator."""
    return bool(getattr(value, "is_cuda", False))
