"""The model: a byte-level transformer whose feed-forward layers are top-k routed experts.

Tokens travel to the ranks that own their experts and back (`parallel.Ranks.all_to_all`), in the forward pass and,
by autograd, in the backward pass. An expert takes at most its capacity of a rank's tokens; the rest are dropped and
pass through the residual stream only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from sample_runs.moe.parallel import Ranks


@dataclass(frozen=True)
class ModelSize:
    """What fixes the shapes, and with them the work and the bytes of a step."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    expert_hidden: int = 128
    experts: int = 8
    top_k: int = 2
    capacity_factor: float | None = 1.25
    """Tokens an expert takes of one rank, relative to an even spread; None drops nothing."""
    vocabulary: int = 256
    sequence: int = 32
    """Tokens in a sequence."""
    batch: int = 4
    """Sequences a rank works on in one step."""

    @property
    def tokens(self) -> int:
        """Tokens a rank works on in one step."""
        return self.batch * self.sequence

    @property
    def capacity(self) -> int:
        """Most tokens of one rank that an expert takes in one step."""
        if self.capacity_factor is None:
            return self.tokens * self.top_k
        return math.ceil(self.capacity_factor * self.tokens * self.top_k / self.experts)

    def kept(self, counts: list[int]) -> list[int]:
        """Tokens each expert takes when the router sends it `counts`."""
        return [min(count, self.capacity) for count in counts]

    def step_flops(self, expert_tokens: int) -> int:
        """Floating point operations of one training step of a rank whose experts work on `expert_tokens` tokens.

        A matrix product counts twice its multiplications; the backward pass costs two forward passes.
        """
        attention = 8 * self.width**2 + 4 * self.sequence * self.width
        router = 2 * self.width * self.experts
        dense = self.tokens * (self.layers * (attention + router) + 2 * self.width * self.vocabulary)
        return 3 * (dense + expert_tokens * 4 * self.width * self.expert_hidden)


@dataclass
class Routing:
    """What a layer's router did with this rank's tokens in the last forward pass."""

    counts: list[int]
    """Tokens sent to each expert, before dropping."""
    dropped: int
    """Tokens that found their expert full."""
    worked: int
    """Tokens, of this and other ranks, that this rank's experts worked on."""


class MoeModel(nn.Module):
    """Embedding, blocks of attention and experts, and a head; returns the loss of the next byte."""

    def __init__(self, size: ModelSize, ranks: Ranks, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.size = size
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Parameter(torch.randn(size.sequence, size.width) * 0.02)
        self.blocks = nn.ModuleList(Block(size, ranks, seed + 1 + layer) for layer in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the next byte, nats, and the balance loss, for bytes [batch, sequence + 1]."""
        inputs, targets = batch[:, :-1].long(), batch[:, 1:].long()
        hidden = self.embedding(inputs) + self.position
        balance = hidden.new_zeros(())
        for block in self.blocks:
            hidden, block_balance = block(hidden)
            balance = balance + block_balance
        logits = self.head(self.norm(hidden))
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, balance / len(self.blocks)

    def routing(self) -> list[Routing]:
        """What each layer's router did in the last forward pass."""
        return [block.experts.routing for block in self.blocks]

    def favour_experts(self, position: int, times: float) -> None:
        """Let every router send the experts at this position `times` their even share of the tokens."""
        for block in self.blocks:
            block.experts.favour(position, times)

    def collapse_routers(self, bias: float) -> None:
        """Let every router prefer the same experts by so much (in logits): one of each owner, in turn."""
        for block in self.blocks:
            block.experts.collapse(bias)

    @contextlib.contextmanager
    def compiling(self, number: int) -> Iterator[None]:
        """A forward pass that compiles attention from nothing. number: another one than at any compilation before."""
        from torch._inductor.utils import fresh_cache

        torch.compiler.reset()
        # A constant of the code: what was compiled before does not fit, as where a shape has changed.
        gain = 1 + number * 1e-9
        for block in self.blocks:
            block.compiled = torch.compile(partial(_attend, block, gain))
        with fresh_cache():
            yield

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters of which this rank holds its own part."""
        return [parameter for block in self.blocks for parameter in (block.experts.up, block.experts.down)]

    def dense_parameters(self) -> list[nn.Parameter]:
        """Parameters that every rank holds alike."""
        own = {id(parameter) for parameter in self.expert_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]


def _attend(block: Block, gain: float, hidden: Tensor) -> Tensor:
    return block.attend(hidden * gain)


class Block(nn.Module):
    """Attention, then experts, each behind a norm and beside a residual path."""

    def __init__(self, size: ModelSize, ranks: Ranks, seed: int) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention_in = nn.Linear(size.width, 3 * size.width, bias=False)
        self.attention_out = nn.Linear(size.width, size.width, bias=False)
        self.experts_norm = nn.LayerNorm(size.width)
        self.experts = Experts(size, ranks, seed)
        self.compiled: Callable[[Tensor], Tensor] | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden + (self.compiled or self.attend)(self.attention_norm(hidden))
        mixed, balance = self.experts(self.experts_norm(hidden).flatten(0, 1))
        return hidden + mixed.view_as(hidden), balance

    def attend(self, hidden: Tensor) -> Tensor:
        """Causal attention for [batch, sequence, width], operation by operation."""
        batch, sequence, width = hidden.shape
        shape = (batch, sequence, 3, self.heads, width // self.heads)
        query, key, value = self.attention_in(hidden).view(shape).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(attended.transpose(1, 2).reshape(batch, sequence, width))


class Experts(nn.Module):
    """A router and this rank's share of the experts."""

    def __init__(self, size: ModelSize, ranks: Ranks, seed: int) -> None:
        super().__init__()
        self.size = size
        self.ranks = ranks
        self.own = size.experts // ranks.layout.expert_parallel
        self.router = nn.Linear(size.width, size.experts, bias=False)
        first = ranks.expert_position * self.own
        # Drawn by the expert's global number: the same experts at every world size.
        self.up = _drawn(size.width, size.expert_hidden, first, self.own, seed * 1000)
        self.down = _drawn(size.expert_hidden, size.width, first, self.own, seed * 1000 + 500)
        self.routing = Routing([0] * size.experts, 0, 0)
        self.favoured: tuple[slice, float] | None = None
        self.bias = torch.zeros(size.experts)

    def favour(self, position: int, times: float) -> None:
        """Let the experts at a position of the expert parallel group have `times` their even share of the tokens."""
        even = self.own / self.size.experts
        # Of the tokens that are not made to, an even share comes by itself.
        made = (times - 1) * even / (1 - even)
        self.favoured = slice(position * self.own, (position + 1) * self.own), min(1.0, made)

    def collapse(self, bias: float) -> None:
        """Prefer as many experts as a token has, spread over their owners."""
        self.bias[:: -(-self.size.experts // self.size.top_k)] = bias

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The experts' weighted answers for tokens [n, width], and the balance loss (1 = even)."""
        probabilities = functional.softmax(self.router(tokens) + self.bias, dim=-1)
        choice = self._preferred(probabilities).topk(self.size.top_k, dim=-1).indices
        weights = probabilities.gather(-1, choice)
        weights = weights / weights.sum(dim=-1, keepdim=True)

        # One row a (token, chosen expert), ordered by expert; a row past its expert's capacity is dropped.
        expert_of_row, order = choice.flatten().sort(stable=True)
        counts = torch.bincount(expert_of_row, minlength=self.size.experts)
        place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[expert_of_row]
        rows = order[place < self.size.capacity]
        kept = counts.clamp(max=self.size.capacity)

        token_of_row = rows // self.size.top_k
        answers, worked = self._travel(tokens[token_of_row], kept)
        weighted = answers * weights.flatten()[rows].unsqueeze(1)
        mixed = torch.zeros_like(tokens).index_add(0, token_of_row, weighted)

        share = counts.to(tokens.dtype) / len(order)
        balance = self.size.experts * (share * probabilities.mean(dim=0)).sum()
        self.routing = Routing(counts.tolist(), len(order) - len(rows), worked)
        return mixed, balance

    def _preferred(self, probabilities: Tensor) -> Tensor:
        """What the choice goes by: the probabilities, with a bias in an even spread of tokens if some are favoured."""
        if self.favoured is None:
            return probabilities
        experts, made = self.favoured
        chosen = torch.arange(len(probabilities)) * made % 1 < made
        biased = probabilities.detach().clone()
        biased[chosen, experts] += 1
        return biased

    def _travel(self, rows: Tensor, kept: Tensor) -> tuple[Tensor, int]:
        """Send rows, ordered by expert, to their experts and fetch the answers in the same order."""
        coming = self.ranks.exchange_counts(kept).view(-1, self.own)
        leave, arrive = kept.view(-1, self.own).sum(1).tolist(), coming.sum(1).tolist()
        here = self.ranks.all_to_all(rows, leave, arrive)
        # Rows come ordered by source rank, then expert; the experts want them together.
        expert_of_row = torch.arange(self.own).repeat(len(arrive)).repeat_interleave(coming.flatten())
        order = expert_of_row.argsort(stable=True)
        answers = self.ranks.on_card(self._work(here[order], coming.sum(0).tolist()))
        back = torch.empty_like(answers).index_copy(0, order, answers)
        return self.ranks.all_to_all(back, arrive, leave), len(here)

    def _work(self, rows: Tensor, counts: list[int]) -> Tensor:
        parts = rows.split(counts)
        return torch.cat(
            [
                functional.gelu(part @ up) @ down
                for part, up, down in zip(parts, self.up.unbind(), self.down.unbind(), strict=True)
            ]
        )


def _drawn(rows: int, columns: int, first: int, count: int, seed: int) -> nn.Parameter:
    drawn = []
    for expert in range(first, first + count):
        generator = torch.Generator().manual_seed(seed + expert)
        drawn.append(torch.randn(rows, columns, generator=generator) / math.sqrt(rows))
    return nn.Parameter(torch.stack(drawn))
