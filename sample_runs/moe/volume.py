"""How many bytes each step must send, by formula: what a recorder of collectives is checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sample_runs.moe.model import ModelSize, MoeModel
from sample_runs.moe.parallel import Layout, fill_buckets

FLOAT_BYTES, COUNT_BYTES = 4, 8
BUCKET_BYTES = 384 * 1024
STEP_TOTALS = 3
"""Float64 numbers summed over the world at the end of a step: loss, experts' squared norm, wish to stop."""


class Sent(NamedTuple):
    """One collective of one rank."""

    op: str
    group: str
    bytes: int
    """Size of this rank's input."""


def expected_bytes(
    size: ModelSize, layout: Layout, rank: int, counts: Sequence[Sequence[Sequence[int]]], model: MoeModel
) -> list[Sent]:
    """The collectives of one plain training step of a rank, in order.

    Args:
        counts: tokens that each rank's router sent to each expert before dropping: [rank][layer][expert].
        model: its parameters' sizes make the gradient buckets.
    """
    ep = f"ep/{layout.group_index('ep', rank)}"
    dp = f"dp/{layout.group_index('dp', rank)}"
    row = FLOAT_BYTES * size.width
    forward: list[Sent] = []
    backward: list[Sent] = []
    for layer in range(size.layers):
        leaving = row * sum(size.kept(list(counts[rank][layer])))
        arriving = row * rows_arriving(size, layout, rank, [of_rank[layer] for of_rank in counts])
        forward += [
            Sent("all_to_all", ep, COUNT_BYTES * size.experts),
            Sent("all_to_all", ep, leaving),
            Sent("all_to_all", ep, arriving),
        ]
        # Gradients take the same way back: first of the answers, then of the rows sent.
        backward = [Sent("all_to_all", ep, leaving), Sent("all_to_all", ep, arriving), *backward]
    buckets = [
        Sent("all_reduce", group, sum(parameter.nbytes for parameter in bucket))
        for group, parameters in (("world/0", model.dense_parameters()), (dp, model.expert_parameters()))
        for bucket in fill_buckets(reversed(parameters), BUCKET_BYTES)
    ]
    totals = Sent("all_reduce", "world/0", STEP_TOTALS * torch.float64.itemsize)
    return [*forward, *backward, *buckets, totals]


def rows_arriving(size: ModelSize, layout: Layout, rank: int, counts: Sequence[Sequence[int]]) -> int:
    """Rows that the rank's experts work on, given the tokens each rank sends to each expert: [rank][expert]."""
    own = size.experts // layout.expert_parallel
    position = rank % layout.expert_parallel
    members = layout.groups()["ep"][layout.group_index("ep", rank)]
    mine = slice(position * own, (position + 1) * own)
    return sum(sum(size.kept(list(counts[member]))[mine]) for member in members)
