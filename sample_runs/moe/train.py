"""One rank of the sample run, from joining the others to leaving them."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sample_runs.moe import data
from sample_runs.moe.faults import Faults
from sample_runs.moe.model import ModelSize, MoeModel
from sample_runs.moe.observe import observer
from sample_runs.moe.parallel import GradientBuckets, Layout, Ranks, join
from sample_runs.moe.volume import BUCKET_BYTES

BALANCE_WEIGHT = 0.01
GRADIENT_LIMIT = 1.0
WARM_UP_STEPS = 10


def main(options: argparse.Namespace) -> int:
    """Train as the options say; returns the exit code."""
    torch.set_num_threads(1)
    stop = Stop()
    rank, world = join()
    if options.world not in (None, world):
        print(f"--world {options.world}, but {world} ranks were started", file=sys.stderr)
        return 2
    play_host(options, rank, world)
    trainer = Trainer(options, rank, world, stop)
    try:
        trainer.run()
    finally:
        trainer.faults.end()
    trainer.ranks.close()
    return 0


class Stop:
    """Whether SIGTERM or SIGINT has asked for an end; the ranks agree on the step after which they stop."""

    def __init__(self) -> None:
        self.wished = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._wish)

    def _wish(self, number: int, frame: Any) -> None:
        self.wished = True


class Trainer:
    """The training loop of one rank and what it needs."""

    def __init__(self, options: argparse.Namespace, rank: int, world: int, stop: Stop) -> None:
        self.options, self.rank, self.world, self.stop = options, rank, world, stop
        self.size = ModelSize(
            layers=options.layers,
            experts=options.experts,
            batch=options.batch,
            sequence=options.sequence,
            capacity_factor=None if options.dropless else options.capacity_factor,
        )
        self.layout = Layout(world, options.expert_parallel or min(2, world), options.experts)
        self.faults = Faults(options.fault, rank, options.batch, options.data_workers, world)
        self.ranks = Ranks(self.layout, rank, self.faults.pace)
        self.model = MoeModel(self.size, self.ranks, options.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.learning_rate, fused=True)
        self.dense = GradientBuckets(self.model.dense_parameters(), BUCKET_BYTES)
        self.expert = GradientBuckets(self.model.expert_parameters(), BUCKET_BYTES)
        training, self.held_out = data.split_corpus(data.read_corpus())
        self.windows = self._windows(training)
        self.lens = observer(not options.no_lens)
        self.flops = 0
        self.losses: list[float] = []

    def run(self) -> None:
        """All steps, or as many as until somebody asks to stop."""
        self._watch()
        batches = data.loader(self.windows, self.size.batch, self.options.data_workers)
        progress = Progress(self.options) if self.rank == 0 else None
        for step, batch in enumerate(self.lens.data(batches)):
            with self.lens.step(step, tokens=self.size.tokens, seq_sq=self.size.batch * self.size.sequence**2):
                loss, stopping = self.train_step(step, batch)
                self._now_and_then(step)
            if progress:
                progress.after(step, loss)
            if stopping:
                if progress:
                    print(f"asked to stop: ended after step {step}", flush=True)
                break
        self._write_losses()

    def train_step(self, step: int, batch: Tensor) -> tuple[float, bool]:
        """One step; returns the loss over all ranks and whether some rank wishes to stop."""
        self._begin_faults(step)
        rate = self._set_learning_rate(step)
        with self.lens.phase("forward"), self.faults.pace.working():
            compiling = due(step, self.options.compile_every)
            with self.model.compiling(step) if compiling else contextlib.nullcontext():
                own_loss, balance = self.model(batch)
            own_loss = self.faults.spoil_loss(step, own_loss)
        with self.lens.phase("backward"):
            with self.faults.pace.working():
                (own_loss + BALANCE_WEIGHT * balance).backward()
            own_norm = math.sqrt(self.dense.square() + self.expert.square())
            self.dense.reduce(self.ranks, None, self.world)
            self.expert.reduce(self.ranks, self.ranks.dp_group, self.world)
        with self.lens.phase("optimizer"):
            loss, gradient_norm, stopping = self._totals(step, own_loss)
            self._update(step, gradient_norm)
        with self.lens.phase("logging"):
            self.losses.append(own_loss.item())
            self._log_experts()
            self._log(loss, own_loss.item(), gradient_norm, own_norm, rate)
        return loss, stopping

    def _begin_faults(self, step: int) -> None:
        self.faults.begin_step(step)
        hot = self.faults.hot_expert
        if hot and hot.rank is not None and step == hot.step:
            self.model.favour_experts(hot.rank % self.layout.expert_parallel, hot.factor)
        collapse = self.faults.collapse
        if collapse and step == collapse.step:
            self.model.collapse_routers(collapse.factor)

    def evaluate(self) -> float:
        """Mean loss on held-out text, over all ranks."""
        count = self.options.eval_batches * self.size.batch
        windows = data.Windows(
            self.held_out, length=self.size.sequence + 1, count=count, seed=self.options.seed, rank=self.rank
        )
        losses = []
        with torch.no_grad():
            for batch in data.loader(windows, self.size.batch, workers=0):
                losses.append(self.model(batch)[0])
        total = torch.stack(losses).mean()
        self.ranks.all_reduce(total)
        return total.item() / self.world

    def save(self, step: int) -> None:
        """Write this rank's part of the model and optimizer; the last one replaces the one before, whole."""
        folder: Path = self.options.out / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"rank{self.rank}.pt"
        partial = target.with_suffix(".new")
        state = {"step": step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        content = io.BytesIO()
        torch.save(state, content)
        self.faults.write(step, partial, content.getbuffer())
        partial.replace(target)

    def _windows(self, training: Tensor) -> data.Windows:
        slow_from = self.faults.slow_loader_from()
        return data.Windows(
            training,
            length=self.size.sequence + 1,
            count=self.options.steps * self.size.batch,
            seed=self.options.seed,
            rank=self.rank,
            slow_from=None if slow_from is None else slow_from * self.size.batch,
            slow_seconds=None if slow_from is None else self.faults.sample_seconds,
        )

    def _watch(self) -> None:
        cards = self.options.card
        card = cards[host_of(self.options, self.rank, self.world) if len(cards) > 1 else 0]
        self.lens.watch(
            self.model,
            self.optimizer,
            name=self.options.name,
            groups=self.layout.groups(),
            experts={
                "layers": self.size.layers,
                "experts": self.size.experts,
                "top_k": self.size.top_k,
                "capacity_factor": self.size.capacity_factor,
                "owner": self.layout.owner(),
            },
            config={
                "steps": self.options.steps,
                "seed": self.options.seed,
                "batch": self.size.batch,
                "sequence": self.size.sequence,
                "width": self.size.width,
                "learning_rate": self.options.learning_rate,
                "data_workers": self.options.data_workers,
            },
            vendor=vendor_of(card),
            card=card,
        )

    def _set_learning_rate(self, step: int) -> float:
        warm = min(1.0, (step + 1) / WARM_UP_STEPS)
        rate: float = (
            self.options.learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / self.options.steps))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _totals(self, step: int, own_loss: Tensor) -> tuple[float, float, bool]:
        """Loss and gradient norm of the whole model, and whether any rank wishes to stop."""
        # Each expert's gradient is held by every rank of a data parallel group: count it once.
        expert_square = self.expert.square() / self.layout.data_parallel
        totals = torch.tensor([own_loss.item(), expert_square, float(self.stop.wished)], dtype=torch.float64)
        handed = self.faults.out_of_line(step, totals)
        if handed is not None:
            self.ranks.all_reduce(handed)
        loss, expert_square, wishes = totals.tolist()
        return loss / self.world, math.sqrt(self.dense.square() + expert_square), wishes > 0

    def _update(self, step: int, gradient_norm: float) -> None:
        if math.isfinite(gradient_norm):
            scale = min(1.0, GRADIENT_LIMIT / (gradient_norm + 1e-6))
            self.dense.scale(scale)
            self.expert.scale(scale)
            self.optimizer.step()
        elif self.rank == 0:
            print(f"step {step}: the gradient is not finite; this step changes nothing", flush=True)
        self.optimizer.zero_grad(set_to_none=False)

    def _log_experts(self) -> None:
        worked = 0
        for layer, routing in enumerate(self.model.routing()):
            self.lens.expert_tokens(layer, routing.counts, routing.dropped)
            worked += routing.worked
        self.flops += self.size.step_flops(worked)

    def _log(self, loss: float, own_loss: float, gradient_norm: float, own_norm: float, rate: float) -> None:
        values = {"train.loss.local": own_loss, "train.grad_norm.local": own_norm, "train.flops": float(self.flops)}
        if self.rank == 0:
            values |= {"train.loss": loss, "train.grad_norm": gradient_norm, "train.lr": rate}
        self.lens.log(values)

    def _now_and_then(self, step: int) -> None:
        if due(step, self.options.eval_every):
            with self.lens.phase("eval"):
                held_out_loss = self.evaluate()
            if self.rank == 0:
                self.lens.log({"eval.loss": held_out_loss})
        if due(step, self.options.checkpoint_every):
            with self.lens.phase("checkpoint"):
                self.save(step)

    def _write_losses(self) -> None:
        if self.options.losses:
            path = self.options.losses.with_name(f"{self.options.losses.name}.{self.rank}")
            path.write_text("\n".join(loss.hex() for loss in self.losses) + "\n")


class Progress:
    """A line every so many steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._every, self._steps = options.print_every, options.steps
        self._since, self._from = time.monotonic(), 0

    def after(self, step: int, loss: float) -> None:
        """Print a line if one is due."""
        if not (due(step, self._every) or (self._every and step + 1 == self._steps)):
            return
        now = time.monotonic()
        each = (now - self._since) / (step + 1 - self._from) * 1000
        print(f"step {step + 1:>5}/{self._steps}   loss {loss:6.3f}   {each:6.1f} ms a step", flush=True)
        self._since, self._from = now, step + 1


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps is done after this one."""
    return bool(every) and (step + 1) % every == 0


def host_of(options: argparse.Namespace, rank: int, world: int) -> int:
    """Which of the hosts that are played this rank is on."""
    return rank // -(-world // options.hosts)


def vendor_of(card: str) -> str:
    """Who makes a card."""
    return "amd" if card.startswith("MI") else "nvidia"


def play_host(options: argparse.Namespace, rank: int, world: int) -> None:
    """Let the ranks of one machine play several hosts: host and device names are read when lens starts."""
    if options.hosts > 1:
        share = -(-world // options.hosts)
        os.environ["LENS_HOST"] = f"host{rank // share}"
        os.environ["LENS_DEVICE"] = f"host{rank // share}/gpu{rank % share}"
