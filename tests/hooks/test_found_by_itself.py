"""Routers told from other modules, what their outputs mean, and the allocator's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lens
from lens.hooks.memory import STATISTICS
from lens.hooks.routers import classify, find_routers
from tests.hooks.ringside import Recorded


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(4, 8, bias=False)
        self.experts = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.gate(tokens)


class GatedUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GatedUnit(), Layer(), GatedUnit(), Layer()])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return sum(layer(tokens) for layer in (self.layers[1], self.layers[3])).sum()


def test_routers_are_found_with_their_layer_and_gated_units_are_not() -> None:
    found = [(router.layer, router.experts, router.top_k) for router in find_routers(Model())]
    assert found == [(1, 8, 2), (3, 8, 2)]


def test_routers_inside_a_compiled_module_are_left_alone() -> None:
    assert find_routers(torch.compile(Model(), backend="eager")) == []


LOGITS = torch.randn(6, 8)
CHOSEN = LOGITS.topk(2).indices
MAP = torch.zeros(6, 8, dtype=torch.bool).scatter(1, CHOSEN, True)
OUTPUTS: dict[str, tuple[Any, int | None, str | None]] = {
    "logits, weights and indices": ((LOGITS, LOGITS.topk(2).values, CHOSEN), 2, "indices"),
    "weights and indices": ((LOGITS.topk(2).values, CHOSEN), None, "indices"),
    "probabilities and a map": ((LOGITS, MAP), 2, "map"),
    "one-hot numbers": ((MAP.long(), LOGITS), 2, "map"),
    "tokens per expert": ((LOGITS.topk(2).values, MAP.long().sum(0)), 2, "counts"),
    "logits": (LOGITS, 2, "logits"),
    "logits of who knows how many": (LOGITS, None, None),
    "nothing": (None, 2, None),
}


@pytest.mark.parametrize(("output", "top_k", "kind"), OUTPUTS.values(), ids=list(OUTPUTS))
def test_an_output_is_told_by_type_and_shape(output: Any, top_k: int | None, kind: str | None) -> None:
    found = classify(output, 8, top_k)
    assert (found and found[0]) == kind


def test_tokens_are_counted_a_layer_and_step(watch: Callable[..., None], recorded: Callable[[], Recorded]) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch(model, optimizer)
    batches = [torch.randn(5, 4) for _ in range(4)]
    for first, second in (batches[:2], batches[2:]):
        for tokens in (first, second):
            model(tokens).backward()
        with torch.no_grad():
            model(first)
        optimizer.step()
    expected = [
        (step, layer, sum(_counts(model.layers[layer], batches[2 * step + part]) for part in (0, 1)).tolist())
        for step in (0, 1)
        for layer in (1, 3)
    ]
    found = recorded()
    assert [(v["step"], v["layer"], list(v["values"])) for v in found.vectors] == expected
    assert "forward" not in vars(model.layers[1].gate)


def _counts(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
    return torch.bincount(layer.gate(tokens).topk(2).indices.flatten(), minlength=8)


def _train(watch: Callable[..., None]) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch(model, optimizer)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


def test_the_allocator_is_read(
    watch: Callable[..., None], recorded: Callable[[], Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"all": {"current": 5, "peak": 7}}
    held = {"allocated_bytes": size, "reserved_bytes": size, "num_alloc_retries": 2}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda: held)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "card")
    _train(watch)
    found = recorded()
    values = {metric: found.values(metric) for metric in STATISTICS}
    assert {metric: value for metric, value in values.items() if value} == {
        "torch.memory.allocated": [(0, 5.0)],
        "torch.memory.reserved": [(0, 5.0)],
        "torch.memory.allocated_peak": [(0, 7.0)],
        "torch.memory.alloc_retries": [(0, 2.0)],
    }


def test_without_a_card_nothing_is_said(watch: Callable[..., None], recorded: Callable[[], Recorded]) -> None:
    _train(watch)
    found = recorded()
    assert not [metric for metric in STATISTICS if found.values(metric)]


def test_what_is_kept_of_a_router_is_bounded_though_each_batch_has_a_new_length(
    watch: Callable[..., None], recorded: Callable[[], Recorded]
) -> None:
    class Router(nn.Module):
        num_experts, top_k = 4, 1

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.argmax(-1)  # (tokens,): a form of its own for each number of tokens

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.router(tokens)

    model = Mixture()
    watch(model)
    kept = model.router.forward._meanings
    with lens.step():
        for length in range(5, 105):
            model(torch.randn(length, 4))
    assert 0 < len(kept) <= 16
    recorded()
