"""The programs that `benchmarks/attach.py` enters; each tells in a shared page where it is and how long its turns take."""

from __future__ import annotations

PLACES = ("forward", "backward", "data", "collective")
"""Of TRAINING's step, in the order of their numbers."""
HEAD = """
import mmap, struct, sys, time
_file = open(sys.argv[1], "r+b")
_beat, _word = mmap.mmap(_file.fileno(), 4096), struct.Struct("=q")
_last, _longest, _count, _seen = time.perf_counter_ns(), 0, 0, 0
def note():
    global _seen
    _seen += 1
    _beat[24:32] = _word.pack(_seen)
def at(place):
    _beat[0:8] = _word.pack(place)
def turn():
    global _last, _longest, _count
    now = time.perf_counter_ns()
    _longest = max(0 if _beat[32] else _longest, now - _last)
    _beat[32] = 0
    _last, _count = now, _count + 1
    _beat[8:24] = _word.pack(_count) + _word.pack(_longest)
"""
ALLOCATING = (
    HEAD
    + """
print("here", flush=True)
while True:
    kept = [{"n": n} for n in range(1000)]
    turn()
"""
)
JOINING = (
    HEAD
    + """
import threading
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
print("here", flush=True)
thread.join()
"""
)
TRAINING = (
    HEAD
    + """
import queue, threading, torch, torch.distributed as dist
from torch import nn
rank = int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)))
optimizer = torch.optim.AdamW(model.parameters())
batches = queue.Queue(1)
def load():
    while True:
        time.sleep(0.004)
        batches.put(torch.randn(64, 256))
threading.Thread(target=load, daemon=True).start()
print("here", flush=True)
while True:
    at(2); batch = batches.get()
    at(0); loss = model(batch).square().mean()
    at(1); optimizer.zero_grad(); loss.backward()
    if rank:
        time.sleep(0.004)
    at(3); dist.all_reduce(torch.ones(1)); at(4)
    optimizer.step()
    turn()
"""
)
UNPREPARED = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters())
print("here", flush=True)
for batch in torch.utils.data.DataLoader(torch.randn(1_000_000, 64), batch_size=16):
    loss = model(batch).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
LEAVES = """
import json, mmap, struct, sys, time, torch, torch.distributed as dist
from torch.optim import optimizer as optimizers
from torch.utils.data import dataloader

kind, page, out, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
_file = open(page, "r+b")
beat = mmap.mmap(_file.fileno(), 4096)
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
plain = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))
model = plain if kind == "plain" else torch.nn.parallel.DistributedDataParallel(plain)
optimizer = torch.optim.AdamW(model.parameters())
if kind in ("aot_eager", "inductor"):
    torch._logging.set_logs(recompiles=True)
    plain.compile(backend=kind)

def names():
    return [
        torch.autograd.backward, torch.nn.Module.__call__, torch.nn.Linear.forward, sys.excepthook, dist.all_reduce,
        dataloader._BaseDataLoaderIter.__next__, torch.optim.Optimizer.__init__, torch._C._dispatch_dump("c10d::allreduce_"),
        dict(optimizers._global_optimizer_pre_hooks), dict(optimizers._global_optimizer_post_hooks),
        *(module.forward for module in model.modules()), *(module._compiled_call_impl for module in model.modules()),
    ]

def graphs():
    from torch._dynamo.utils import counters
    return json.dumps([counters["stats"], counters["graph_break"]])

before, first, took, worked, losses = names(), "", [], [], []
while steps == 0 or len(took) < steps:
    began, at_work = time.perf_counter_ns(), time.thread_time_ns()
    loss = model(torch.randn(64, 256)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    dist.all_reduce(torch.ones(1))
    losses.append(loss.item().hex())
    took.append(time.perf_counter_ns() - began)
    worked.append(time.thread_time_ns() - at_work)
    beat[0:8] = struct.pack("=q", len(took))
    if len(took) == 100:
        first = graphs()
    if beat[8]:
        break
same = {"names": before == names(), "graphs": first == graphs()}
with open(out, "w") as file:
    json.dump({**same, "took": took, "worked": worked, "losses": losses}, file)
"""
