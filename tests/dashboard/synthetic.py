"""Synthetic runs: records as an agent would send them, a verdict and a ledger as a diagnosis would give."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

PHASES = {"data": 0.06, "forward": 0.3, "backward": 0.48, "optimizer": 0.1}


def run_object(run: str, ranks: int = 4, name: str | None = None) -> dict[str, Any]:
    """What rank 0 posts when the run begins."""
    placed = [
        {
            "rank": rank,
            "host": f"host{rank // 2}",
            "device": f"host{rank // 2}/gpu{rank % 2}",
            "vendor": "nvidia",
            "model": "H200",
        }
        for rank in range(ranks)
    ]
    return {"run": run, "name": name or run, "world_size": ranks, "ranks": placed, "simulated": True}


def steps(
    first: int,
    last: int,
    ranks: int = 4,
    slow: tuple[int, int, float] | None = None,
    end_s: float | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Records of steps [first, last), the last of which ends at Unix time `end_s`.

    `slow` = (rank, from step, factor): that rank computes so much longer; all wait for it in their backward.
    """
    generator = random.Random(seed + first)
    usual = 0.042
    end = end_s if end_s is not None else time.time()
    for step in range(first, last):
        begin = int((end - (last - step) * usual * 1.5) * 1e9)
        times = []
        for rank in range(ranks):
            factor = slow[2] if slow and rank == slow[0] and step >= slow[1] else 1.0
            warm = 6.0 if step == 0 else 1.0
            times.append(usual * factor * warm * generator.uniform(0.97, 1.06))
        slowest = max(times)
        for rank, own in enumerate(times):
            seconds = slowest * generator.uniform(0.985, 1.0) if slow and step >= slow[1] else own
            yield {
                "type": "span", "kind": "step", "name": "step", "rank": rank, "step": step, "t0_ns": begin,
                "t1_ns": begin + int(seconds * 1e9), "attrs": {"tokens": 2048},
            }  # fmt: skip
            at = begin
            for phase, share in PHASES.items():
                length = int((own if phase in ("forward", "optimizer") else seconds) * share * 1e9)
                yield {
                    "type": "span", "kind": "phase", "name": phase, "rank": rank, "step": step, "t0_ns": at,
                    "t1_ns": at + length,
                }  # fmt: skip
                at += length
        loss = 1.4 + 4.1 * 2.7 ** (-step / 60) + generator.uniform(-0.04, 0.04)
        yield {"type": "sample", "t_ns": begin, "metric": "train.loss", "value": loss, "rank": 0, "step": step}


def ndjson(records: Any) -> bytes:
    """The body of a POST of records."""
    return "\n".join(json.dumps(record) for record in records).encode()


def healthy(run: str, upto_step: int) -> dict[str, Any]:
    """Nothing found."""
    return {
        "run": run, "upto_step": upto_step, "status": "healthy", "hypotheses": [],
        "coverage": {"ranks_reporting": 4, "world_size": 4, "signals_missing": []},
    }  # fmt: skip


def slow_device(run: str, upto_step: int, onset: int = 40) -> dict[str, Any]:
    """Rank 2's card runs at a lower clock."""
    first = {
        "finding": 0, "cause": "slow_device", "severity": "warning", "ranks": [2], "groups": [],
        "component": "host1/gpu0", "confidence": 0.94, "onset_step": onset, "detected_step": onset + 4,
        "end_step": None, "slowdown_pct": 38.4, "lost_seconds_per_step": 0.0163, "lost_device_hours": 0.0021,
        "evidence": [
            {"metric": "gpu.clock.sm", "ranks": [2], "baseline": 1980, "observed": 990, "effect": -0.5},
            {"metric": "comm.self", "ranks": [2], "baseline": 0.0312, "observed": 0.0468, "effect": 0.5},
        ],
        "against": [
            {"cause": "hot_expert", "because": "milliseconds per token rose with the token count unchanged"},
            {"cause": "slow_dataloader", "because": "the data phase of rank 2 did not move"},
            {"cause": "thermal_throttle", "because": "no thermal throttle reason is set"},
        ],
        "recommendation": "Take host1/gpu0 out of the job and check its clocks (nvidia-smi -q -d "
        "CLOCK,PERFORMANCE); a card that stays slow when idle should be replaced.",
        "what_if": {"step_seconds_now": 0.0587, "step_seconds_if_fixed": 0.0424},
    }  # fmt: skip
    rival = {
        **first, "cause": "shared_device", "confidence": 0.04, "evidence": [], "against": [],
        "recommendation": None,
    }  # fmt: skip
    coverage = {"ranks_reporting": 4, "world_size": 4, "signals_missing": ["net.rdma.retransmits"]}
    return {
        "run": run,
        "upto_step": upto_step,
        "status": "degraded",
        "hypotheses": [first, rival],
        "coverage": coverage,
    }


def several(upto_step: int) -> dict[str, Any]:
    """Two troubles at once, the first with a rival and the second over, and a note that is no trouble."""
    reply = slow_device("faulty", upto_step)
    first = reply["hypotheses"][0]
    unpriced = {"slowdown_pct": None, "lost_seconds_per_step": None, "lost_device_hours": None, "what_if": None}
    leak = {
        **first, **unpriced, "finding": 1, "cause": "slow_dataloader", "ranks": [1], "component": "host0",
        "confidence": 0.81, "onset_step": 12, "detected_step": 17, "end_step": 30, "evidence": [], "against": [],
    }  # fmt: skip
    note = {
        **leak, "finding": 2, "cause": "mixed_vendor_imbalance", "severity": "info", "ranks": [0, 1],
        "component": None, "onset_step": 0, "detected_step": 8, "end_step": None,
    }  # fmt: skip
    return {**reply, "hypotheses": [*reply["hypotheses"], leak, note]}


def ledger(upto_step: int, waiting: float = 0.06) -> dict[str, Any]:
    """Where the time of the ranks went; collection, bubbles and restarts were not measured."""
    wall = upto_step * 0.045 * 4
    parts = {
        "compute": 0.74 - waiting, "exposed_communication": 0.14, "straggler_wait": waiting, "data": 0.06,
        "checkpoint": 0.02, "gc": None, "bubble": None, "restart": 0.0, "other": 0.04,
    }  # fmt: skip
    seconds = {name: None if share is None else share * wall for name, share in parts.items()}
    return {"from_step": 0, "to_step": upto_step, "wall_s": wall, "parts": seconds}
