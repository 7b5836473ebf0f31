"""Requests served by a simulated cluster, iteration by iteration, from physics.

Each rank attends to requests of its own and keeps their keys and values; all share the experts. An iteration computes one
token of every running request, and beside them a chunk of the prompts of new ones. A request waits until there is a place
for it and room for its keys and values; where room runs out, the newest is put back and computed again later.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lens.tables import Tables
from sample_runs.cluster.condition import Condition, Floats
from sample_runs.cluster.fabric import Fabric
from sample_runs.cluster.layout import Layout
from sample_runs.cluster.simulation import CLOCK_OFFSET_S, EXPERTS_OF_RANK, HALF, HIDDEN, START_NS, TOP_K
from sample_runs.cluster.traffic import SERVED, Disturbance, Load, Trouble
from sample_runs.cluster.writer import Writer

LAYERS = 2
PLACES, ROOM, CHUNK = 8, 12000, 256
"""Of a rank: requests at once, tokens whose keys and values it can keep, prompt tokens of one iteration."""
PROMPT, LONGEST_PROMPT, OUTPUT, LONGEST_OUTPUT = 200.0, 700, 50.0, 150
RATE = 4.0
"""Requests a second that a rank can serve of these lengths, about."""
FIXED_S, DECODE_S, PREFILL_S, KEPT_S = 8e-3, 1.5e-4, 3e-5, 4e-7
"""Attention of an iteration: reading the weights, and what each decoded, prefilled and kept token adds."""
EXPERT_S, COPY_S, MANY_COPIES = 6e-3, 1e-4, 200.0
"""Experts of an iteration: reading the weights, and each token that arrives; of many, those after them cost less."""
FULLEST = 0.98
"""A request is begun while less than this of the room would be taken."""


@dataclass(frozen=True)
class Service:
    """A service to simulate. load: arrivals over what can be served. told: whether iterations are told as steps."""

    layout: Layout = field(default_factory=lambda: Layout(8, ep=8))
    iterations: int = 900
    noise: str = "steady"
    faults: tuple[Trouble, ...] = ()
    seed: int = 0
    load: float = 0.6
    name: str = "service"
    told: bool = True

    def run(self) -> dict[str, Any]:
        """The run object."""
        return self.layout.run(self.name, LAYERS, EXPERTS_OF_RANK * self.layout.ep, TOP_K) | {
            "name": "simulated service"
        }

    def healthy(self) -> Service:
        """The same, to the last random number, without its faults."""
        return replace(self, faults=())


@dataclass(frozen=True)
class Served:
    """What was recorded. rank, arrived, lasted (s): of each request that ended; begun: when each iteration was."""

    tables: Tables
    rank: NDArray[np.int64]
    arrived: Floats
    lasted: Floats
    begun: Floats


@dataclass
class _Request:
    arrived: float
    prompt: int
    output: int
    begun: float = -1.0
    first: float = -1.0
    made: int = 0
    left: int = 0
    """Prompt tokens (and made ones, after it was put back) that are still to be computed."""
    put_back: int = 0

    @property
    def kept(self) -> int:
        """Tokens whose keys and values are kept."""
        return self.prompt + self.made - self.left


def serve(service: Service) -> Served:
    """Run it."""
    return _Serving(service).served()


class _Serving:
    def __init__(self, service: Service) -> None:
        layout, seed = service.layout, service.seed
        self.service, self.layout, self.writer = service, layout, Writer()
        self.random = np.random.default_rng([seed, 11])
        self.traffic = np.random.default_rng([seed, 12])
        self.load: Load = SERVED[service.noise].make(np.random.default_rng([seed, 13]))
        self.fabric = Fabric(layout, np.random.default_rng([seed, 14]), np.random.default_rng([seed, 15]))
        self.calm = Condition(layout.ranks)
        offset = np.random.default_rng([seed, 16]).uniform(-CLOCK_OFFSET_S, CLOCK_OFFSET_S, layout.hosts)
        self.offset = offset[layout.host]
        self.clock = np.zeros(layout.ranks)
        self.queues: list[deque[_Request]] = [deque() for _ in range(layout.ranks)]
        self.running: list[list[_Request]] = [[] for _ in range(layout.ranks)]
        self.put_back = np.zeros(layout.ranks)
        self.ended: list[tuple[int, _Request, float, int]] = []
        self.members = layout.groups()["ep"]
        self.names = self.writer.codes(f"ep/{place}" for place in range(len(self.members)))
        self.taste = np.exp(0.1 * self.random.standard_normal((LAYERS, EXPERTS_OF_RANK * layout.ep)))
        self.seq = 0
        self.arrives = 0.0
        self.count = 0

    def served(self) -> Served:
        """All iterations."""
        begun = []
        for step in range(self.service.iterations):
            now = self._disturbed(step)
            self._arrive(now)
            if not any(self.running) and not any(self.queues):
                # Nobody is there: the ranks rest until somebody comes.
                self.clock = np.maximum(self.clock, self.arrives)
                self._arrive(now)
            begun.append(float(self.clock.min()))
            self._iterate(step, now)
        self._tell_requests()
        rank = np.array([rank for rank, *_ in self.ended], np.int64)
        arrived = np.array([request.arrived for _, request, _, _ in self.ended])
        lasted = np.array([left - request.arrived for _, request, left, _ in self.ended])
        return Served(self.writer.tables(), rank, arrived, lasted, np.array(begun))

    def _disturbed(self, step: int) -> Disturbance:
        now = Disturbance(self.layout.ranks)
        self.load.cold(step, now)
        for fault in self.service.faults:
            if step >= fault.step:
                fault.kind.act(now, fault.rows(self.layout), fault.strength, step - fault.step)
        return now

    def _arrive(self, now: Disturbance) -> None:
        """Requests that have come by now stand in the queue of one rank after another."""
        ranks = self.layout.ranks
        while self.arrives <= self.clock.min():
            prompt, output = self.load.lengths(self.traffic)
            prompt_tokens = int(np.clip(PROMPT * prompt * now.prompt, 8, LONGEST_PROMPT * now.prompt))
            request = _Request(self.arrives, prompt_tokens, int(np.clip(OUTPUT * output, 4, LONGEST_OUTPUT)))
            request.left = prompt_tokens
            self.queues[self.count % ranks].append(request)
            self.count += 1
            rate = RATE * ranks * self.service.load * self.load.rate(self.arrives) * now.rate
            self.arrives += float(self.traffic.exponential(1 / max(rate, 1e-3)))
            self.arrives = self.load.open_from(self.arrives)

    def _iterate(self, step: int, now: Disturbance) -> None:
        ranks = self.layout.ranks
        begun = self.clock.copy()
        prefill, decode, kept = (np.zeros(ranks) for _ in range(3))
        working: list[list[tuple[_Request, int]]] = []
        for rank in range(ranks):
            working.append(self._planned(rank, float(begun[rank]), now))
            prefill[rank] = sum(tokens for _, tokens in working[rank] if tokens)
            decode[rank] = sum(not tokens for _, tokens in working[rank])
            kept[rank] = sum(request.kept for request in self.running[rank])
        self._compute(step, now, prefill, decode, kept)
        for rank in range(ranks):
            self._advance(rank, working[rank], step)
        if self.service.told:
            rows = np.arange(ranks)
            t0, t1 = self._stamp(begun), self._stamp(self.clock)
            self.writer.add(
                "steps",
                ranks,
                rank=rows,
                step=step,
                t0_ns=t0,
                t1_ns=t1,
                tokens=prefill + decode,
                recompiles=now.compiled,
            )
            self.writer.add("spans", ranks, rank=rows, step=step, kind="phase", name="forward", t0_ns=t0, t1_ns=t1)
        self._tell(step, now, prefill, decode)
        self.clock = self.clock + 2e-5

    def _planned(self, rank: int, moment: float, now: Disturbance) -> list[tuple[_Request, int]]:
        """What a rank computes next: its requests, with the prompt tokens of those that are not through theirs."""
        room, queue, running = ROOM * now.room[rank], self.queues[rank], self.running[rank]
        while queue and len(running) < PLACES:
            request = queue[0]
            taken = sum(other.prompt + other.made for other in running)
            if taken + request.prompt + request.made > FULLEST * room:
                break
            queue.popleft()
            request.begun = moment if request.begun < 0 else request.begun
            running.append(request)
        while len(running) > 1 and sum(other.prompt + other.made + 1 for other in running) > room:
            request = running.pop()
            request.left, request.put_back = request.prompt + request.made, request.put_back + 1
            queue.appendleft(request)
            self.put_back[rank] += 1
        left, plan = CHUNK * now.chunk, []
        for request in running:
            tokens = min(request.left, int(left))
            left -= tokens
            if tokens or not request.left:
                plan.append((request, tokens))
        return plan

    def _compute(self, step: int, now: Disturbance, prefill: Floats, decode: Floats, kept: Floats) -> None:
        """Attention, dispatch, experts, combine."""
        ranks = self.layout.ranks
        for layer in range(LAYERS):
            taste = self.taste[layer].copy()
            for owner, factor in now.router.items():
                taste[EXPERTS_OF_RANK * owner : EXPERTS_OF_RANK * (owner + 1)] *= factor
            usual, turned = self.taste[layer] / self.taste[layer].sum(), taste / taste.sum()
            # What routers like in decoding need not be what they like in prompts.
            sent = TOP_K * (prefill[:, None] * usual + decode[:, None] * turned)
            sent = self.random.poisson(sent).astype(np.float64)
            of_owner = sent.reshape(ranks, self.layout.ep, EXPERTS_OF_RANK).sum(axis=2)
            arrived = np.zeros(ranks)
            for group in self.members:
                arrived[group] = of_owner[group].sum(axis=0)
            jitter = np.exp(0.02 * self.random.standard_normal(ranks)) * now.slow / LAYERS
            attention = FIXED_S + DECODE_S * decode + PREFILL_S * prefill + KEPT_S * kept
            experts = EXPERT_S + COPY_S * MANY_COPIES * np.log1p(arrived / MANY_COPIES)
            size, back = sent.sum(axis=1) * HIDDEN * HALF, arrived * HIDDEN * HALF
            self.clock = self.clock + attention * jitter
            self._meet(step, layer, size, back)
            self.clock = self.clock + experts * jitter
            self._meet(step, layer, back, size)
            if self.service.told:
                self.writer.vectors(
                    "moe.expert.tokens",
                    sent,
                    rank=np.arange(ranks),
                    step=step,
                    layer=layer,
                    t_ns=self._stamp(self.clock),
                )

    def _meet(self, step: int, layer: int, given: Floats, other: Floats) -> None:
        members = self.members
        entered = self.clock[members]
        most = np.maximum(given, other)[members]
        left = entered.max(axis=1) + self.fabric.seconds("all_to_all", members, most, self.calm)
        out = np.broadcast_to(left[:, None], members.shape)
        if self.service.told:
            rows = members.reshape(-1)
            self.writer.add(
                "collectives", len(rows), rank=rows, step=step, op="all_to_all", phase="forward", layer=layer,
                group=np.repeat(self.names, members.shape[1]), seq=self.seq, bytes=np.rint(given[rows]),
                t0_ns=self._stamp(entered.reshape(-1), rows), t1_ns=self._stamp(out.reshape(-1), rows),
            )  # fmt: skip
        self.seq += 1
        self.clock[members] = out

    def _advance(self, rank: int, plan: list[tuple[_Request, int]], step: int) -> None:
        """The iteration is over: tokens are there, and some requests have all of theirs."""
        moment = float(self.clock[rank])
        for request, tokens in plan:
            request.left -= tokens
            if request.left:
                continue
            request.made += 1
            request.first = moment if request.first < 0 else request.first
            if request.made >= request.output:
                self.running[rank].remove(request)
                self.ended.append((rank, request, moment, step))

    def _tell(self, step: int, now: Disturbance, prefill: Floats, decode: Floats) -> None:
        """What a server logs of each iteration."""
        ranks, when = np.arange(self.layout.ranks), self._stamp(self.clock)
        about: dict[str, Any] = {"rank": ranks, "t_ns": when, **({"step": step} if self.service.told else {})}
        kept = np.array([sum(request.kept for request in part) for part in self.running], float)
        sample = self.writer.samples
        if self.service.told:
            sample("infer.batch.tokens", prefill, {"kind": "prefill"}, **about)
            sample("infer.batch.tokens", decode, {"kind": "decode"}, **about)
        sample("infer.kv_cache.usage", np.minimum(1.0, kept / (ROOM * now.room)), **about)
        sample("infer.requests.running", np.array([len(part) for part in self.running], float), **about)
        sample("infer.queue.depth", np.array([len(queue) for queue in self.queues], float), **about)
        sample("infer.preemptions", self.put_back.copy(), **about)

    def _tell_requests(self) -> None:
        rows = np.array([rank for rank, *_ in self.ended], np.int64)
        stamp = {
            name: self._stamp(np.array(values), rows)
            for name, values in (
                ("begun", [request.begun for _, request, _, _ in self.ended]),
                ("first", [request.first for _, request, _, _ in self.ended]),
                ("left", [left for _, _, left, _ in self.ended]),
            )
        }
        attrs = [
            json.dumps({
                "number": number, "prompt_tokens": request.prompt, "output_tokens": request.output, "preemptions": request.put_back,
                "queue_ns": round((request.begun - request.arrived) * 1e9), "t_first_token_ns": int(stamp["first"][number]),
            }, sort_keys=True, separators=(",", ":"))
            for number, (_, request, _, _) in enumerate(self.ended)
        ]  # fmt: skip
        told = {"step": np.array([step for *_, step in self.ended])} if self.service.told else {}
        self.writer.add(
            "spans", len(rows), rank=rows, kind="request", name="model", t0_ns=stamp["begun"], t1_ns=stamp["left"],
            attrs=self.writer.codes(attrs), **told,
        )  # fmt: skip

    def _stamp(self, seconds: Floats, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Nanoseconds by the clock of each rank's host."""
        offset = self.offset if rows is None else self.offset[rows]
        return START_NS + np.rint((seconds + offset) * 1e9).astype(np.int64)
