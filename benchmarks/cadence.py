"""A real training step of a given length, and the time spent at its edges: what a hook adds, met with cold caches.

The edges are where the user's code and the code it calls hand over to each other, with little between the two clocks
but what a hook puts there: from the call of a function until the original of what is replaced begins, and from
its end until the caller goes on; before and after an optimizer's hook, the clocks are hooks too. Where lens
stands inside torch, below the function that is called (the compiled observer of collectives), the edge is from where
that function enters C++ until it has returned; its backend here does nothing, since its own time would be noise.

Every edge is kept by itself, by name and by its place in the step. What a hook adds is then told edge by edge: the middle
of that edge's times with it, less the middle without (which holds the clock pair). A sum of whole steps scatters by
more than the hook costs; an edge of a microsecond does not. Short blocks of steps with and without take turns, and each
block is compared with the two beside it: what changes more slowly than that (clock rates, other work on the
machine) is on both sides.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

import lens

clock = time.perf_counter_ns
Spent = dict[str, list[int]]
"""Name of an edge -> its times in one step, ns, in their order."""


class Edges:
    """Nanoseconds at the edges of a step."""

    def __init__(self) -> None:
        self.spent: Spent = {}
        self._since = 0

    def leave(self, *_: Any) -> None:
        """User code, or an original, hands over."""
        self._since = clock()

    def arrive(self, name: str) -> None:
        """An original, or user code, takes over."""
        now = clock()
        self.spent.setdefault(name, []).append(now - self._since)


class Added(NamedTuple):
    """What is added to a step, µs."""

    typical: float
    p90: float
    p90_without: float
    """How far nine of ten steps without a hook stay below: the scatter of the edges themselves."""


def added(with_it: Sequence[Spent], without: Sequence[Spent], names: Sequence[str]) -> Added:
    """What the edges of these names have in steps with a hook, over those without."""
    places = [(name, place) for name in names for place in range(len(without[0].get(name, ())))]
    usual = {key: _middle([spent[key[0]][key[1]] for spent in without]) for key in places}
    typical = sum(_middle([spent[name][place] for spent in with_it]) - usual[name, place] for name, place in places)
    whole = sum(usual.values())

    def p90(steps: Sequence[Spent]) -> float:
        sums = [sum(sum(spent.get(name, ())) for name in names) - whole for spent in steps]
        return statistics.quantiles(sums, n=10)[-1] / 1000

    return Added(typical / 1000, p90(with_it), p90(without))


class Paired(NamedTuple):
    """Microseconds a step: the median over pairs of blocks, and the interval that holds it with 95 % confidence."""

    typical: float
    low: float
    high: float


def in_turns(blocks: Sequence[Sequence[Spent]], names: Sequence[str]) -> Paired:
    """What the edges of these names have in every second block, the first being the second one, over its neighbours."""
    sums = [
        sum(_middle([spent[name][place] for spent in block]) for name in names for place in range(len(block[0].get(name, ()))))
        for block in blocks
    ]  # fmt: skip
    return median_of([sums[n] - (sums[n - 1] + sums[n + 1]) / 2 for n in range(1, len(sums) - 1, 2)])


def median_of(differences: Sequence[float]) -> Paired:
    """The median of these, ns, and an interval that holds the true one in 95 of 100 cases whatever their distribution:
    between two of them, by the binomial law of how many lie below it."""
    ordered, many = sorted(differences), len(differences)
    outside, below = 0, 0.0
    while (below := below + math.comb(many, outside) / 2**many) <= 0.025:
        outside += 1
    place = max(0, outside - 1)
    return Paired(*(ns / 1000 for ns in (statistics.median(ordered), ordered[place], ordered[-1 - place])))


def _middle(values: list[int]) -> float:
    """Mean of the middle half: as steady as a median, and does not jump where times come in two kinds."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return statistics.fmean(ordered[quarter : len(ordered) - quarter])


class Router(nn.Module):
    """A mixture's router with nothing behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(64, 8)
        self.experts = nn.Identity()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.gate(tokens)


class Network(nn.Module):
    """Blocks of small layers, as many as bring a step to its length."""

    def __init__(self, blocks: int, routers: int, edges: Edges) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_block() for _ in range(blocks))
        self.routers = nn.ModuleList(Router() for _ in range(routers))
        self.edges = edges
        self.after_block: Callable[[int], None] = lambda block: None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.edges.arrive("forward begins")
        for index, block in enumerate(self.blocks):
            batch = block(batch)
            self.after_block(index)
            if index < len(self.routers):
                self.edges.leave()
                self.routers[index](batch)
                self.edges.arrive("routers")
        loss = batch.square().mean()
        self.edges.leave()
        return loss


class Optimizer(torch.optim.SGD):
    """SGD that notes where its own step begins and ends; before it begins its first hook looks at the clock."""

    def __init__(self, parameters: Any, edges: Edges) -> None:
        super().__init__(parameters, lr=0.001)
        self.edges = edges
        self.register_step_pre_hook(edges.leave)

    def step(self, closure: Any = None) -> Any:
        self.edges.arrive("optimizer begins")
        result = super().step(closure)
        self.edges.leave()
        return result


class TrainingStep:
    """One training step with a number of collectives, and the edges it crosses."""

    def __init__(self, seconds: float, collectives: int, routers: int = 0) -> None:
        torch.manual_seed(0)
        self.edges = Edges()
        self.network = Network(_blocks_for(seconds), routers, self.edges)
        self.optimizer = Optimizer(self.network.parameters(), self.edges)
        self.network.after_block = self._collectives_after
        self._buffer = torch.ones(1024)
        blocks = len(self.network.blocks)
        self._after = [collectives * (n + 1) // blocks - collectives * n // blocks for n in range(blocks)]

    def run(self, batches: Iterator[torch.Tensor], watched: bool) -> tuple[int, Spent]:
        """One step; returns its time and the times at its edges, ns."""
        edges = self.edges
        edges.spent = {}
        began = clock()
        edges.leave()
        batch = next(batches)
        edges.arrive("batch arrives")
        edges.leave()
        if watched:
            with lens.step():
                self._inside(batch, lens.log)
        else:
            self._inside(batch, None)
        edges.arrive("step ends")
        return clock() - began, edges.spent

    def _inside(self, batch: torch.Tensor, log: Callable[[dict[str, float]], None] | None) -> None:
        edges = self.edges
        edges.arrive("step begins")
        edges.leave()
        loss = self.network(batch)
        edges.arrive("forward ends")
        edges.leave()
        loss.backward()
        edges.arrive("backward ends")
        # Kept, so that no edge has its end within it.
        self._loss = loss
        self.optimizer.step()
        self.optimizer.zero_grad()
        values = {"train.loss": loss.item(), "train.grad_norm": 1.0}
        edges.leave()
        if log is not None:
            log(values)
        edges.arrive("log of two values")
        edges.leave()

    def batches(self) -> Iterator[torch.Tensor]:
        """A loader that costs nothing itself."""
        batch = torch.randn(4, 32, 64)
        while True:
            self.edges.arrive("batch is asked for")
            self.edges.leave()
            yield batch

    @contextlib.contextmanager
    def noted(self, collectives: bool = False) -> Iterator[None]:
        """Functions that a hook replaces note where they begin and end: ``backward``, and `collectives` where it does;
        where it is below them, the call into C++ notes that it begins."""
        edges = self.edges
        backward, all_reduce, below = torch.autograd.backward, dist.all_reduce, vars(dist.ProcessGroup)["allreduce"]
        enter_below = dist.ProcessGroup.allreduce

        def noted_backward(*arguments: Any, **more: Any) -> None:
            edges.arrive("backward begins")
            backward(*arguments, **more)
            edges.leave()

        @functools.wraps(all_reduce)
        def noted_all_reduce(tensor: torch.Tensor, *more: Any) -> Any:
            edges.arrive("collectives begin")
            result = all_reduce(tensor, *more)
            edges.leave()
            return result

        def noted_below(*arguments: Any) -> Any:
            edges.leave()
            return enter_below(*arguments)

        torch.autograd.backward = noted_backward
        if collectives:
            dist.all_reduce = noted_all_reduce
        else:
            dist.ProcessGroup.allreduce = noted_below
        try:
            yield
        finally:
            torch.autograd.backward, dist.all_reduce = backward, all_reduce
            dist.ProcessGroup.allreduce = below

    @contextlib.contextmanager
    def noted_last(self) -> Iterator[None]:
        """The optimizer's last hook looks at the clock: to be entered when all others are there."""
        handle = self.optimizer.register_step_post_hook(lambda *_: self.edges.arrive("optimizer ends"))
        try:
            yield
        finally:
            handle.remove()

    def _collectives_after(self, block: int) -> None:
        for _ in range(self._after[block]):
            self.edges.leave()
            dist.all_reduce(self._buffer)
            self.edges.arrive("collectives")


def _block() -> nn.Module:
    return nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)


def _blocks_for(seconds: float) -> int:
    """How many blocks make a step this long on this machine."""
    block, batch, took = _block(), torch.randn(4, 32, 64), []
    for _ in range(60):
        began = time.perf_counter()
        block(batch).square().mean().backward()
        took.append(time.perf_counter() - began)
    # The quickest: what the machine's other work adds is not the step's.
    return max(1, round(seconds / min(took)))
