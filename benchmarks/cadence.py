"""A real training step of a given length, and the time spent at its edges: what a hook adds, met with cold caches.

The edges are where the user's code and the code it calls hand over to each other: from the user's call until the
original begins, and from the original's end until the user's code goes on. A collective is one edge from call to
return: its backend here does nothing, since its own time would be noise.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lens

clock = time.perf_counter_ns


class Edges:
    """Nanoseconds at the edges of a step, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = {}
        self._since = 0

    def leave(self) -> None:
        """User code, or an original, hands over."""
        self._since = clock()

    def arrive(self, name: str) -> None:
        """An original, or user code, takes over."""
        now = clock()
        self.spent[name] = self.spent.get(name, 0) + now - self._since


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
    """SGD that notes where its own step begins and ends."""

    edges: Edges

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
        self.optimizer = Optimizer(self.network.parameters(), lr=0.001)
        self.optimizer.edges = self.edges
        self.network.after_block = self._collectives_after
        self._buffer = torch.ones(1024)
        blocks = len(self.network.blocks)
        self._after = [collectives * (n + 1) // blocks - collectives * n // blocks for n in range(blocks)]

    def run(self, batches: Iterator[torch.Tensor], watched: bool) -> tuple[int, dict[str, int]]:
        """One step; returns its time and the times at its edges, ns."""
        edges = self.edges
        edges.spent = {}
        began = clock()
        edges.leave()
        batch = next(batches)
        edges.arrive("batch arrives")
        edges.leave()
        with lens.step() if watched else contextlib.nullcontext():
            edges.arrive("step begins")
            edges.leave()
            loss = self.network(batch)
            edges.arrive("forward ends")
            edges.leave()
            torch.autograd.backward(loss)
            edges.arrive("backward ends")
            edges.leave()
            self.optimizer.step()
            edges.arrive("optimizer ends")
            self.optimizer.zero_grad()
            values = {"train.loss": loss.item(), "train.grad_norm": 1.0}
            edges.leave()
            if watched:
                lens.log(values)
            edges.arrive("log of two values")
            edges.leave()
        edges.arrive("step ends")
        return clock() - began, edges.spent

    def batches(self) -> Iterator[torch.Tensor]:
        """A loader that costs nothing itself."""
        batch = torch.randn(4, 32, 64)
        while True:
            self.edges.arrive("batch is asked for")
            self.edges.leave()
            yield batch

    @contextlib.contextmanager
    def noted_backward(self) -> Iterator[None]:
        """``torch.autograd.backward`` that notes where the original begins and ends."""
        original, edges = torch.autograd.backward, self.edges

        def backward(loss: torch.Tensor) -> None:
            edges.arrive("backward begins")
            original(loss)
            edges.leave()

        torch.autograd.backward = backward
        try:
            yield
        finally:
            torch.autograd.backward = original

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
