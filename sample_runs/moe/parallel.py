"""Who computes what: expert parallel groups of neighbouring ranks, data parallel groups across them.

Every rank reads its own data. Experts are split over the ranks of an expert parallel group; ranks at the same
position of different groups hold the same experts and average their gradients (group kind ``dp``). All other
parameters are averaged over the whole world. World 4 with 2-way expert parallelism: ep [[0, 1], [2, 3]],
dp [[0, 2], [1, 3]].
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the world's group as a default argument. Imported after the group is made (making an optimizer
# does so), they hold the group for ever: its threads outlive `Ranks.close` and meet the interpreter's end.
import torch.distributed.nn.functional
from torch import Tensor, nn

from sample_runs.moe.faults import Pace


@dataclass(frozen=True)
class Layout:
    """How the ranks are grouped.

    Raises:
        ValueError: the world cannot be cut into such groups, or the experts not among them.
    """

    world: int
    expert_parallel: int
    experts: int

    def __post_init__(self) -> None:
        if self.world % self.expert_parallel:
            raise ValueError(f"{self.world} ranks cannot form expert parallel groups of {self.expert_parallel}")
        if self.experts % self.expert_parallel:
            raise ValueError(f"{self.experts} experts cannot be split over {self.expert_parallel} ranks")

    @property
    def data_parallel(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // self.expert_parallel

    def groups(self) -> dict[str, list[list[int]]]:
        """Global ranks of every group, by kind."""
        size = self.expert_parallel
        return {
            "ep": [list(range(first, first + size)) for first in range(0, self.world, size)],
            "dp": [list(range(position, self.world, size)) for position in range(size)],
        }

    def owner(self) -> list[int]:
        """For each expert, the position in its expert parallel group of the rank that holds it."""
        share = self.experts // self.expert_parallel
        return [expert // share for expert in range(self.experts)]

    def group_index(self, kind: str, rank: int) -> int:
        """Which group of this kind the rank is in."""
        return next(index for index, members in enumerate(self.groups()[kind]) if rank in members)


class Ranks:
    """This rank among the others: its groups, and the collectives that training uses."""

    def __init__(self, layout: Layout, rank: int, pace: Pace) -> None:
        self.layout = layout
        self.rank = rank
        self.expert_position = rank % layout.expert_parallel
        self.pace = pace
        made = {kind: [dist.new_group(members) for members in lists] for kind, lists in layout.groups().items()}
        self.ep_group = made["ep"][layout.group_index("ep", rank)]
        self.dp_group = made["dp"][layout.group_index("dp", rank)]

    def all_reduce(self, tensor: Tensor, group: Any = None) -> None:
        """Sum over the group, in place; group None is the world."""
        with self.pace.paused():
            dist.all_reduce(tensor, group=group)

    def exchange_counts(self, counts: Tensor) -> Tensor:
        """Rows that each rank of the expert parallel group sends to each of this rank's experts: [ranks * own]."""
        received = torch.empty_like(counts)
        with self.pace.paused():
            dist.all_to_all_single(received, counts, group=self.ep_group)
        return received

    def all_to_all(self, rows: Tensor, leave: list[int], arrive: list[int]) -> Tensor:
        """Send `leave[i]` rows to rank i of the expert parallel group, receive `arrive[i]`; differentiable."""
        return _AllToAll.apply(rows, leave, arrive, self)  # type: ignore[no-any-return,no-untyped-call]

    def on_card(self, rows: Tensor) -> Tensor:
        """The rows, once the card has worked on them, forward and later backward."""
        if not self.pace.row_seconds:
            return rows
        return _OnCard.apply(rows, self.pace)  # type: ignore[no-any-return,no-untyped-call]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """Leave the process groups, together; no collective can follow."""
        dist.barrier()
        # A group that somebody still holds outlives this, and its threads meet the interpreter's end: that aborts.
        del self.ep_group, self.dp_group
        dist.destroy_process_group()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, leave: list[int], arrive: list[int], ranks: Ranks) -> Tensor:
        context.leave, context.arrive, context.ranks = leave, arrive, ranks
        return _exchange(rows, leave, arrive, ranks)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back = _exchange(gradients[0], context.arrive, context.leave, context.ranks)
        return back, None, None, None


class _OnCard(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, pace: Pace) -> Tensor:
        context.pace = pace
        pace.hold(len(rows))
        return rows.view_as(rows)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # A backward pass costs two forward passes.
        context.pace.hold(2 * len(gradients[0]))
        return gradients[0], None


def _exchange(rows: Tensor, leave: list[int], arrive: list[int], ranks: Ranks) -> Tensor:
    received = rows.new_empty(sum(arrive), *rows.shape[1:])
    with ranks.pace.paused():
        dist.all_to_all_single(received, rows.contiguous(), arrive, leave, group=ranks.ep_group)
    return received


class GradientBuckets:
    """Flat buffers in which the gradients of some parameters lie, summed over a group with one all-reduce a buffer.

    Each parameter's ``grad`` is a view into a buffer: autograd adds to it in place, nothing is packed or unpacked.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], limit_bytes: int) -> None:
        # Last layers first, the order in which a backward pass has them ready.
        filled = fill_buckets(reversed(parameters), limit_bytes)
        self.buffers = [torch.zeros(sum(parameter.numel() for parameter in bucket)) for bucket in filled]
        for bucket, buffer in zip(filled, self.buffers, strict=True):
            parts = buffer.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def reduce(self, ranks: Ranks, group: Any, divisor: int) -> None:
        """Replace each gradient by its sum over the group divided by `divisor`."""
        for buffer in self.buffers:
            ranks.all_reduce(buffer, group)
            buffer.div_(divisor)

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for buffer in self.buffers:
            buffer.mul_(factor)

    def square(self) -> float:
        """Sum of the squares of all gradients."""
        return sum(float(buffer.dot(buffer)) for buffer in self.buffers)


def fill_buckets(parameters: Iterable[nn.Parameter], limit_bytes: int) -> list[list[nn.Parameter]]:
    """Cut the list into runs of at most `limit_bytes`; a parameter above the limit has a bucket to itself."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if not buckets or parameter.nbytes > room:
            buckets.append([])
            room = limit_bytes
        buckets[-1].append(parameter)
        room -= parameter.nbytes
    return buckets


def join() -> tuple[int, int]:
    """Join the world that torchrun describes, or be a world of one; returns rank and world size."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()
