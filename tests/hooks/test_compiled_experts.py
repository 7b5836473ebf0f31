"""Tokens of experts inside a compiled module, where somebody asks for them: counted right, with the graphs as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lens
from lens.settings import Settings
from tests.hooks.ringside import read_rings

Trained = tuple[list[str], dict[Any, list[int]], int]
"""Losses, tokens of each (step, layer), graphs."""
EXPERTS, CHOSEN, WIDTH, TOKENS = 4, 2, 8, 12


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.top_k = CHOSEN

    def forward(self, tokens: torch.Tensor) -> Any:
        weights, chosen = (tokens @ self.weight.t()).softmax(-1).topk(CHOSEN, -1)
        return weights, chosen


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Router()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
        weights, chosen = self.gate(tokens)
        shares = torch.zeros(TOKENS, EXPERTS).scatter(-1, chosen, weights)
        return tokens + sum(expert(tokens) * shares[:, n, None] for n, expert in enumerate(self.experts)), chosen


class Model(nn.Module):
    """One layer plain, one checkpointed: what is computed once more must not count again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        tokens, first = self.layers[0](tokens)
        tokens, second = checkpoint(self.layers[1], tokens, use_reentrant=False)
        return tokens.pow(2).mean(), [first, second]


def trained(rings: Path | None) -> Trained:
    """Three steps, and an evaluation after the second."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if rings is not None:
        settings = Settings.load(
            {}, rings=rings, ring_mib=1, agent=False, max_overhead_pct=100, compiled_experts=True
        )
        lens.watch(compiled, optimizer, settings=settings)
    losses, tokens = [], {}
    for step in range(3):
        loss, given = compiled(torch.randn(TOKENS, WIDTH))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
        tokens |= {
            (step, layer): torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
            for layer, chosen in enumerate(given)
        }
        if step == 1:
            with torch.no_grad():
                compiled(torch.randn(TOKENS, WIDTH))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    lens.detach()
    return losses, tokens, graphs


@pytest.fixture(scope="module")
def alone() -> Trained:
    return trained(None)


def test_each_token_counts_once_and_losses_and_graphs_are_the_same(alone: Trained, rings: Path) -> None:
    assert trained(rings) == alone
    (found,) = read_rings(rings)
    assert {(v["step"], v["layer"]): list(v["values"]) for v in found.vectors} == alone[1]
