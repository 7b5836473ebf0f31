"""A training script in which one rank leaves the line at a step: ``hanging.py HOW RANK STEP``."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

HOW, WHO, WHEN = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(100_000):
        apart = HOW if (rank, step) == (WHO, WHEN) else ""
        optimizer.zero_grad()
        model(torch.randn(16, 64)).square().mean().backward()
        if apart == "sleep":
            time.sleep(3600)
        if apart != "skip":
            dist.all_reduce(torch.randn(8, 64), group=pair)
        for parameter in model.parameters():
            dist.all_reduce(torch.zeros(7) if apart == "shape" else parameter.grad)
        optimizer.step()
        time.sleep(0.02)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
