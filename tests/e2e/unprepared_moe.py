"""A small mixture-of-experts training that knows nothing of lens: ``unprepared_moe.py FOLDER RANK``.

Once FOLDER/slow exists, RANK computes every step's forward pass several times over. Ends once FOLDER/stop exists.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

FOLDER, SLOW = Path(sys.argv[1]), int(sys.argv[2])
EXPERTS, TOP_K, WIDTH = 4, 2, 96
MORE = 6
"""Forward passes that the slow rank adds to a step."""


class MoeLayer(nn.Module):
    """A residual layer of experts, each token computed by its two."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, tokens: Tensor) -> Tensor:
        weights, chosen = functional.softmax(self.gate(tokens), -1).topk(TOP_K)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            out = out + share * functional.gelu(expert(tokens))
        return tokens + out


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    layers = nn.Sequential(MoeLayer(), MoeLayer())
    model = nn.parallel.DistributedDataParallel(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    asked = torch.zeros(1)
    while not asked:
        batch = torch.randn(512, WIDTH)
        if rank == SLOW and (FOLDER / "slow").exists():
            with torch.no_grad():
                for _ in range(MORE):
                    layers(batch)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        asked = torch.tensor([float((FOLDER / "stop").exists())])
        dist.all_reduce(asked)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
    # torch 2.13 aborts now and then while an interpreter with DDP over gloo ends, with or without lens: 3 of 40 times.
    sys.stdout.flush()
    os._exit(0)
