"""Training programs as people write them, without a line of lens; rank 0 prints its losses, bit by bit."""

from __future__ import annotations

DDP_LOOP = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
model = torch.nn.parallel.DistributedDataParallel(layers)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
batches = iter(torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=4, num_workers=1))
for step in range(6):
    with model.no_sync():
        model(next(batches)).pow(2).mean().backward()
    loss = model(next(batches)).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(step, total.item().hex())
dist.destroy_process_group()
"""

MIXTURE_LOOP = """
import contextlib
import torch
import torch.distributed as dist

class Router(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 4, bias=False)

    def forward(self, tokens):
        return self.project(tokens).softmax(-1).topk(2, -1)

class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.gate = Router()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, tokens):
        weights, chosen = self.gate(tokens)
        share = [(weights * (chosen == number)).sum(-1, keepdim=True) for number in range(4)]
        return tokens + sum(expert(tokens) * part for expert, part in zip(self.experts, share))

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(Mixture(), Mixture(), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
held_out = torch.randn(8, 16)
step = contextlib.nullcontext
# lens
batches = iter(torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=4))
for number in range(6):
    with step():
        for _ in range(2):
            loss = model(next(batches)).pow(2).mean()
            loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        if number % 3 == 2:
            with torch.no_grad():
                score = model(held_out).pow(2).mean()
            dist.all_reduce(score, async_op=True).wait()
            dist.barrier()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(number, loss.item().hex())
dist.destroy_process_group()
"""

FSDP_LOOP = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

class Router(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 4, bias=False)

    def forward(self, tokens):
        return self.project(tokens).softmax(-1).topk(2, -1)

class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.gate = Router()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, tokens):
        weights, chosen = self.gate(tokens)
        share = [(weights * (chosen == number)).sum(-1, keepdim=True) for number in range(4)]
        return tokens + sum(expert(tokens) * part for expert, part in zip(self.experts, share))

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, tokens):
        for layer in self.layers:
            tokens = checkpoint(layer, tokens, use_reentrant=False)
        return tokens

dist.init_process_group("gloo")
torch.manual_seed(0)
model = Model()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for part in (*model.layers, model):
    fully_shard(part, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for step in range(5):
    loss = model(torch.randn(12, 16)).pow(2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(step, loss.item().hex())
dist.destroy_process_group()
"""

TRAINER = """
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
)
rows = [torch.randint(0, 64, (16,)) for _ in range(64)]
arguments = TrainingArguments(
    "out", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, report_to=[], use_cpu=True,
    save_strategy="no", disable_tqdm=True, logging_steps=1, eval_strategy="steps", eval_steps=3,
)
trainer = Trainer(
    MixtralForCausalLM(config), arguments,
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    eval_dataset=[{"input_ids": row, "labels": row} for row in rows[:4]],
)
trainer.train()
print([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
"""

SPAWNED = """
import os
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model(torch.ones(2, 4)).sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, (os.getcwd(),), nprocs=2)
"""

COMPILED = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 1)

    def forward(self, batch):
        return self.inner(batch).relu()

torch.manual_seed(0)
for in_place in (True, False):
    model = Net()
    called = model
    if in_place:
        model.compile(fullgraph=True, backend="eager")
    else:
        called = torch.compile(model, fullgraph=True, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        loss = called(torch.ones(2, 4)).sum()
        loss.backward()
        optimizer.step()
    print(loss.item().hex(), torch._dynamo.utils.counters["stats"]["unique_graphs"])
    del optimizer
"""

PLAIN_LOOP = """
import sys
import torch

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
"""

COMPILED_STEP = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def train(batch):
    loss = model(batch).sum()
    loss.backward()
    optimizer.step()
    return loss

compiled = torch.compile(train, backend="eager")
for step in range(3):
    print(compiled(torch.ones(2, 4)).item().hex())
print(sum(torch._dynamo.utils.counters["graph_break"].values()))
"""
