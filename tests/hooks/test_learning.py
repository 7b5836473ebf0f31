"""Loss, gradient norm and learning rate of a training that logs none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lens
from tests.hooks.ringside import Recorded

Watch, Read = Callable[..., None], Callable[[], Recorded]


def training() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.5)


def loss_of(model: nn.Module, number: int) -> torch.Tensor:
    loss: torch.Tensor = model(torch.full((2, 4), float(number))).square().mean()
    return loss


def test_losses_norm_and_rate_are_those_that_the_training_worked_with(watch: Watch, recorded: Read) -> None:
    model, optimizer = training()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    watch(model, optimizer)
    losses, norms = [], []
    for step in range(4):
        parts = [loss_of(model, 1 + step) / 2, loss_of(model, 2 + step) / 2]
        for part in parts:
            part.backward()
        losses.append(parts[0].item() + parts[1].item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    found = recorded()
    assert [value for _, value in found.values("train.loss.local")] == losses[1:]
    assert [value for _, value in found.values("train.grad_norm")] == norms[1:]
    assert [value for _, value in found.values("train.lr")] == [0.25, 0.125, 0.0625]
    assert [step for step, _ in found.values("train.loss.local")] == [1, 2, 3]


def test_a_scaled_loss_is_told_as_it_was_before(watch: Watch, recorded: Read) -> None:
    model, optimizer = training()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watch(model, optimizer)
    losses = []
    for _ in range(2):
        loss = loss_of(model, 1)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert recorded().values("train.loss.local") == [(1, losses[1])]


def test_what_the_training_logs_itself_is_not_told_twice(watch: Watch, recorded: Read) -> None:
    model, optimizer = training()
    watch(model, optimizer)
    for _ in range(2):
        loss = loss_of(model, 1)
        with lens.step():
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lens.log({"train.loss.local": 7.0, "train.lr": 3.0})
    found = recorded()
    assert [value for _, value in found.values("train.loss.local")] == [7.0, 7.0]
    assert [value for _, value in found.values("train.lr")] == [3.0, 3.0]
    assert len(found.values("train.grad_norm")) == 1


def test_a_loss_that_is_no_number_is_told_so(watch: Watch, recorded: Read) -> None:
    model, optimizer = training()
    watch(model, optimizer)
    for factor in (1.0, float("nan")):
        (loss_of(model, 1) * factor).backward()
        optimizer.step()
    ((_, value),) = recorded().values("train.loss.local")
    assert value != value


GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "several numbers": lambda model: model(torch.ones(2, 4)).backward(torch.ones(2, 1)),
    "a gradient of its own": lambda model: model(torch.ones(1, 4)).backward(torch.ones(1, 1)),
    "several tensors": lambda model: torch.autograd.backward([loss_of(model, 1), loss_of(model, 2)]),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=list(GIVEN))
def test_what_is_no_loss_is_not_taken_for_one(given: Callable[[Any], Any], watch: Watch, recorded: Read) -> None:
    model, optimizer = training()
    watch(model, optimizer)
    for _ in range(2):
        given(model)
        optimizer.step()
    found = recorded()
    assert found.values("train.loss.local") == []
    assert len(found.steps) == 2


def test_two_optimizers_in_one_step_have_no_loss_in_common(watch: Watch, recorded: Read) -> None:
    (one, first), (other, second) = training(), training()
    watch(one, first)
    watch(other, second)
    for _ in range(3):
        with lens.step():
            for model, optimizer in ((one, first), (other, second)):
                loss_of(model, 1).backward()
                optimizer.step()
    assert recorded().values("train.loss.local") == []
