"""Every metric once: name, unit, kind, labels, what it means, and whether more of it is worse.

A new metric is one row here and one line where it is read; store, charts, exports and documentation follow.
Units are UCUM as in OpenTelemetry: ratios are 0..1 with unit ``1``, bytes ``By``, seconds ``s``, ``W``, ``J``,
``Cel``. Counters are cumulative since the process or driver started; a decrease is a reset. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram", "vector"]


@dataclass(frozen=True)
class Metric:
    """One metric of the catalogue."""

    name: str
    unit: str
    kind: Kind
    labels: tuple[str, ...]
    """Labels of a point; run, host, rank, device and simulated belong to the resource and are not listed."""
    help: str
    more_is_worse: bool | None
    """True or False where a direction is good or bad, None where neither is."""
    family: str


_MORE_IS_WORSE = {"+": True, "-": False, "": None}
_KINDS: dict[str, Kind] = {"g": "gauge", "c": "counter", "h": "histogram", "v": "vector"}

# name | unit | g gauge, c counter, h histogram, v vector | labels | + more is worse, - less is worse | help
_ROWS = {
    "gpu activity": """
hw.gpu.utilization|1|g||-|Share of the time a kernel ran; waiting in a collective counts too
gpu.memory.activity|1|g||-|Share of the time device memory was read or written
gpu.sm.active|1|g||-|Share of the streaming multiprocessors that were busy
gpu.sm.occupancy|1|g||-|Warps resident, of the most possible
gpu.tensor.active|1|g||-|Share of the time the tensor cores worked
gpu.fp64.active|1|g|||Share of the time non-tensor 64-bit arithmetic ran
gpu.fp32.active|1|g|||Share of the time non-tensor 32-bit arithmetic ran
gpu.fp16.active|1|g|||Share of the time non-tensor 16-bit arithmetic ran
gpu.dram.active|1|g||-|Device memory bandwidth used, of its peak
gpu.graphics.active|1|g|||Share of the time any engine of the device was active
""",
    "gpu memory": """
hw.gpu.memory.limit|By|g|||Device memory there is
hw.gpu.memory.usage|By|g||+|Device memory in use, the driver's own share left out
gpu.memory.reserved_driver|By|g|||Device memory that driver and firmware keep for themselves
hw.gpu.memory.utilization|1|g||+|Device memory in use, of what there is
gpu.memory.host_visible.usage|By|g|||Device memory mapped into the host's address space
gpu.process.memory.usage|By|g|pid|+|Device memory of one process
gpu.process.utilization|1|g|pid||Share of the device's time one process used
torch.memory.allocated|By|g||+|Bytes in live tensors of torch's allocator
torch.memory.reserved|By|g||+|Bytes torch's allocator has taken from the device
torch.memory.active|By|g||+|Bytes in blocks that are live or wait for a stream
torch.memory.inactive_split|By|g||+|Bytes in split blocks nobody uses: fragmentation
torch.memory.allocated_peak|By|g||+|Most bytes ever allocated
torch.memory.alloc_retries|{retry}|c||+|Allocations that had to empty the cache first
torch.memory.ooms|{oom}|c||+|Allocations that failed for lack of memory
""",
    "gpu power": """
hw.power|W|g|hw.type,scope||Power drawn now
gpu.power.module|W|g|||Power of the whole module, processor included
hw.energy|J|c|hw.type||Energy used since the driver was loaded
gpu.power.limit|W|g||-|Power limit in force
gpu.clock.sm|MHz|g||-|Clock of the streaming multiprocessors now
gpu.clock.sm.max|MHz|g|||Highest clock of the streaming multiprocessors
gpu.clock.memory|MHz|g||-|Clock of the device memory now
hw.temperature|Cel|g|sensor|+|Temperature
hw.temperature.limit|Cel|g|limit||Temperature at which the device slows down
gpu.throttle.reasons|{bitmask}|g|||Why clocks are lowered: 0x4 power cap, 0x20 and 0x40 heat, 0x80 brake
gpu.throttle.power.time|s|c||+|Time with clocks lowered by the power limit
gpu.throttle.thermal.time|s|c|source|+|Time with clocks lowered by heat
gpu.throttle.brake.time|s|c||+|Time with clocks lowered by the power brake
gpu.throttle.below_max.ratio|1|g||-|Clock while busy, of the highest clock
hw.fan.speed_ratio|1|g|||Fan speed, of its highest
""",
    "gpu health": """
hw.errors|{error}|c|hw.type,error.type,block,port|+|Hardware errors counted by the device
gpu.rows.remapped|{row}|g|kind|+|Memory rows replaced because they failed, or waiting to be
hw.status|1|g|hw.state||1 for the state the device is in, 0 for the others
gpu.retired_pages|{page}|g||+|Memory pages taken out of use
gpu.perf_state|1|g|||Performance state, 0 the fastest
""",
    "gpu links": """
hw.gpu.io|By|c|link,network.io.direction||Bytes over a link of the device
gpu.nvlink.bandwidth|By/s|g|network.io.direction||Bytes a second over all NVLinks
gpu.link.up|1|g|link|-|1 when the link is up
gpu.link.speed|By/s|g|link|-|Speed of one link in one direction
gpu.link.errors|{error}|c|link,error.type|+|Errors counted on a link
gpu.pcie.throughput|By/s|g|network.io.direction||Bytes a second over PCIe
gpu.pcie.replays|{replay}|c||+|PCIe packets sent again
gpu.pcie.link.speed|GT/s|g||-|PCIe transfers a second and lane now
gpu.pcie.link.speed.max|GT/s|g|||PCIe transfers a second and lane at best
gpu.pcie.link.width|{lane}|g||-|PCIe lanes in use
gpu.pcie.link.width.max|{lane}|g|||PCIe lanes at best
gpu.c2c.bandwidth|By/s|g|network.io.direction||Bytes a second between processor and device of one module
gpu.c2c.errors|{error}|c||+|Errors between processor and device of one module
gpu.fabric.state|1|g|||State of the switch fabric, 3 when it is complete
""",
    "network": """
hw.network.io|By|c|port,network.io.direction||Bytes through a port
hw.network.packets|{packet}|c|port,network.io.direction||Packets through a port
hw.network.bandwidth.limit|By/s|g|port|-|Speed of a port in one direction
hw.network.bandwidth.utilization|1|g|port,network.io.direction||Bandwidth used, of the port's speed
hw.network.up|1|g|port|-|1 when the port is active and its link is up
net.ib.xmit_wait.time|s|c|port|+|Time a port had data to send and no credit
net.ib.xmit_wait.ticks|{tick}|c|port|+|Ticks a port had data to send and no credit; how long one is, its maker knows
net.ib.xmit_discards|{packet}|c|port|+|Packets dropped on the way out
net.ib.link_downed|{event}|c|port|+|Times the link went down
net.roce.cnp_sent|{packet}|c|port|+|Congestion notifications sent
net.roce.cnp_handled|{packet}|c|port|+|Congestion notifications that slowed this sender
net.roce.ecn_marked|{packet}|c|port|+|Packets that arrived marked for congestion
net.rdma.out_of_sequence|{packet}|c|port|+|Packets that arrived out of order
net.rdma.retransmits|{packet}|c|port,kind|+|Packets sent again, by reason
net.rdma.out_of_buffer|{packet}|c|port|+|Packets dropped for lack of a receive buffer
net.eth.pause|{frame}|c|interface,network.io.direction,prio|+|Pause frames
system.network.io|By|c|network.interface.name,network.io.direction||Bytes through a network interface
system.network.errors|{error}|c|network.interface.name,network.io.direction|+|Errors of a network interface
""",
    "host": """
system.cpu.utilization|1|g|||Share of the processors' time not idle
system.memory.usage|By|g|system.memory.state|+|Host memory by state
system.memory.limit|By|g|||Host memory there is
system.disk.io|By|c|system.device,disk.io.direction||Bytes read from and written to a disk
host.pressure.some|1|g|resource|+|Share of the last 10 s in which some task waited for the resource
host.pressure.full|1|g|resource|+|Share of the last 10 s in which all tasks waited for the resource
host.numa.remote|{page}|c|node|+|Pages a node served to processors of other nodes
hw.host.power|W|g|sensor||Power of the processors or of the module
system.paging.operations|{page}|c|system.paging.direction|+|Pages swapped in and out
system.cpu.steal.time|s|c||+|Time the hypervisor gave to others
container.memory.usage|By|g||+|Memory of the control group
container.memory.limit|By|g|||Memory the control group may use
container.cpu.throttled.time|s|c||+|Time the control group was stopped by its processor quota
container.oom_kills|{kill}|c||+|Processes of the control group killed for lack of memory
""",
    "process": """
process.cpu.utilization|1|g|||Processor time used a second; above 1 with several threads
process.cpu.time|s|c|||Processor time used
process.cpu.run_delay|s|c||+|Time the main thread was ready to run and had no processor
process.memory.usage|By|g||+|Resident memory
process.thread.count|{thread}|g|||Threads
process.disk.io|By|c|disk.io.direction||Bytes the process had read from and written to disks
process.context_switches|{cs}|c|process.context_switch_type||Times the main thread gave up or lost its processor
process.paging.faults|{fault}|c|process.paging.fault_type|+|Page faults
process.gc.time|s|c||+|Time in Python's garbage collector
""",
    "training": """
train.step.duration|s|h||+|Time of one step
train.phase.duration|s|h|phase|+|Time of one phase of a step
train.tokens|{token}|c||-|Tokens worked on
train.flops|{FLOP}|c|||Floating point operations done by the model
train.tokens.rate|{token}/s|g||-|Tokens a second of this rank, in a step that was measured
train.flops.rate|{FLOP}/s|g||-|Operations of the model a second, of this rank, in a step that was measured
train.flops.hardware_rate|{FLOP}/s|g|||As train.flops.rate, what is computed once more to save memory counted too
train.mfu|1|g||-|Model operations a second, of the device's dense peak
train.hfu|1|g||-|As train.mfu, recomputation counted
train.loss|1|g||+|Loss, reduced over ranks
train.loss.local|1|g||+|Loss of this rank before any reduction
train.grad_norm|1|g|||Norm of the gradient
train.grad_norm.local|1|g|||Norm of this rank's gradient before any reduction
train.lr|1|g|||Learning rate
train.epoch|1|g|||Passes over the data so far, by the framework's count
train.tokens.seen|{token}|c|||Tokens that all ranks have trained on so far, by the framework's count
eval.loss|1|g||+|Loss on data that is not learned from
train.data_wait|s|c||+|Time spent waiting for the next batch
train.data.queue_depth|{batch}|g||-|Batches the loader holds ready
train.checkpoint.duration|s|h||+|Time of one checkpoint
train.recompiles|{recompile}|c||+|Times the compiler compiled again
train.sequence.squared|{token2}|g|||Sum of squared sequence lengths, which attention cost follows
step.duration|s|v||+|Time of one step; a vector is over ranks
step.self|s|v||+|Own time of a rank in one step: what collectives that hold it up leave of it
step.tokens|{token}|g||-|Tokens that a rank works on in one step
phase.duration|s|v|phase|+|Time of one phase; a vector is over ranks
""",
    "communication": """
comm.op.duration|s|h|op,group|+|Time of one collective
comm.op.bytes|By|c|op,group||Bytes given to collectives
comm.given.bytes|By|v|group,op||Bytes this rank has given to each rank of a group in one step, by all-to-alls
comm.algbw|By/s|g|op,group|-|Bytes of a collective by its time
comm.busbw|By/s|g|op,group|-|comm.algbw corrected for the algorithm and the number of ranks
comm.wait.duration|s|h|op,group|+|Time waited for the last rank to arrive
comm.exposed.time|s|c|group|+|Communication not hidden behind computation
comm.self|s|v|group,op,phase|+|Own time before a collective; over ranks
comm.wait|s|v|group,op,phase|+|Time waited for the last to arrive; over ranks
comm.transfer|s|v|group,op,phase|+|Time from the last arrival to the exit; over ranks
""",
    "experts": """
moe.tokens.routed|{token}|c|layer||Tokens times experts per token
moe.tokens.kept|{token}|c|layer||Routed tokens that found room
moe.tokens.dropped|{token}|c|layer|+|Routed tokens beyond the capacity
moe.expert.tokens|{token}|v|layer||Tokens the router sends to each expert, before dropping
moe.expert.norm|1|v|layer||Norm of each expert's weights
moe.load.imbalance|1|g|layer|+|Most tokens of an expert by the mean
moe.router.entropy|1|g|layer|-|Entropy of the router, 1 when even
moe.aux_loss|1|g|layer||Auxiliary loss
moe.all_to_all.duration|s|h|layer,dir|+|Time of one dispatch or combine
moe.dead_experts|{expert}|g|layer|+|Experts with under 1 % of the mean tokens
""",
    "lens": """
lens.collector.read.duration|s|h|backend,group|+|Time one reading of a group of metrics took
lens.collector.errors|{error}|c|backend,metric,code|+|Readings that failed
lens.collector.supported|1|g|backend,metric,reason||1 when the device gives the metric, else 0 with the reason
lens.collector.lag|s|g||+|Time from a sample to its shipping
lens.collector.dropped|{slot}|c||+|Slots given up because the spool was full or damaged, or the server refused them
lens.overhead.time|s|g||+|The hook's own time in the step
lens.overhead.ratio|1|g||+|The hook's own time, of the step
lens.recorder.overwritten|{slot}|c||+|Slots of a ring overwritten before the agent read them
lens.agent.cpu.utilization|1|g||+|Processor time the agent uses a second
lens.agent.memory.usage|By|g||+|Resident memory of the agent
lens.spool.size|By|g||+|Bytes that wait in the agent's spool
lens.spool.dropped|{batch}|c||+|Batches dropped because the spool was full
lens.spool.corrupt|{batch}|c||+|Damaged places passed over in the spool
lens.spool.quarantined|{batch}|c||+|Batches the server refused for good
""",
    "inference": """
infer.request.ttft|s|h|model|+|Time to the first token
infer.request.tpot|s|h|model|+|Time per further token
infer.request.duration|s|h|model|+|Time of the whole request
infer.request.queue_time|s|h|model|+|Time from arrival to first scheduling
infer.requests.running|{request}|g|||Requests being worked on
infer.requests.waiting|{request}|g||+|Requests waiting
infer.tokens.prompt|{token}|c|||Prompt tokens
infer.tokens.generated|{token}|c||-|Generated tokens
infer.kv_cache.bytes|By|g||+|Bytes of keys and values
infer.kv_cache.usage|1|g||+|Keys and values, of their capacity
infer.queue.depth|{request}|g||+|Requests queued
infer.batch.tokens|{token}|g|kind||Tokens of one forward pass
infer.batch.size|{request}|g|||Requests of one forward pass
infer.expert.tokens|{token}|v|layer,kind||Tokens the router sends to each expert in the prefill or decode of one request
infer.memory.peak|By|g|kind|+|Most device memory allocated in the prefill or decode of a request, where it was more than ever before
infer.preemptions|{event}|c||+|Requests put back
infer.speculative.accepted|1|g||-|Drafted tokens that were accepted
""",
}


def _rows() -> Iterable[Metric]:
    for family, text in _ROWS.items():
        for line in text.strip().splitlines():
            name, unit, kind, labels, direction, help_text = line.split("|")
            label_names = tuple(labels.split(",")) if labels else ()
            yield Metric(name, unit, _KINDS[kind], label_names, help_text, _MORE_IS_WORSE[direction], family)


METRICS: dict[str, Metric] = {metric.name: metric for metric in _rows()}
"""Every metric by name, in the order of the catalogue."""

_USER_METRIC = re.compile(r"[a-zA-Z_][a-zA-Z0-9_./-]{0,127}")
_UNIT_SUFFIXES = {
    "1": "_ratio",
    "By": "_bytes",
    "By/s": "_bytes_per_second",
    "s": "_seconds",
    "W": "_watts",
    "J": "_joules",
    "Cel": "_celsius",
    "MHz": "_megahertz",
}


def get(name: str) -> Metric | None:
    """The metric of this name, or None when the catalogue does not have it."""
    return METRICS.get(name)


def is_known(name: str) -> bool:
    """Whether the catalogue has this metric."""
    return name in METRICS


def is_valid_user_metric(name: str) -> bool:
    """Whether a program may record a metric of its own under this name."""
    return _USER_METRIC.fullmatch(name) is not None


def prometheus_name(metric: Metric) -> str:
    """The metric's name in Prometheus form: ``hw.gpu.memory.usage`` is ``lens_hw_gpu_memory_usage_bytes``."""
    name = "lens_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric.name)
    suffix = _UNIT_SUFFIXES.get(metric.unit, "")
    if not name.endswith(suffix):
        name += suffix
    return name + "_total" if metric.kind == "counter" else name
