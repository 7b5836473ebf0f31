"""Mixture-of-experts models of every listed family: is each router found, is each token counted, is a request told right?

Each is the real class with a small random configuration. One training step: what lens counts for each expert must equal
what the experts were really given, seen at their own door. One ``generate``: bytes of keys and values must equal the
configuration's arithmetic, and times a stopwatch: the clock that the hook reads goes on in the model's head only, by
7 ms in the prefill and 2 ms in each decode. Then models compiled whole, and DDP and FSDP2 on two ranks: with and without
lens. Needs `pip install 'mistrallens[prove]'`.

    python benchmarks/routers.py [--json] [--out docs/proofs/routers.md] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import lens
from benchmarks.router_families import EXPERTS, FAMILIES, LAYERS, Family, given_to_experts, tokens_of
from benchmarks.router_runs import Run, runs
from lens.hooks import requests
from lens.settings import Settings
from tests.hooks.ringside import Recorded, read_rings

PREFILL_NS, DECODE_NS = 7_000_000, 2_000_000
BATCH, PROMPT, NEW = 2, 9, 6


class Found(NamedTuple):
    """What became of one family."""

    family: str
    model: str
    routers: int
    tokens: int
    """Tokens times experts for each, of one step, by hand."""
    counts_equal: bool
    losses_equal: bool
    kv_bytes: float | None
    kv_by_hand: int | None
    ttft_ms: float | None
    tpot_ms: float | None
    decode_equal: bool | None
    problem: str = ""

    @property
    def right(self) -> bool:
        """Whether everything that can be compared is equal."""
        told = (self.kv_by_hand is None) or (
            self.kv_bytes == self.kv_by_hand
            and (self.ttft_ms, self.tpot_ms) == (PREFILL_NS / 1e6, DECODE_NS / 1e6)
            and bool(self.decode_equal)
        )
        return not self.problem and self.routers == LAYERS and self.counts_equal and self.losses_equal and told


@contextmanager
def watched(model: Any, optimizer: Any) -> Iterator[list[Recorded]]:
    """Record into a folder of its own; the list has what was recorded, afterwards."""
    found: list[Recorded] = []
    with tempfile.TemporaryDirectory() as folder:
        rings = Path(folder) / "rings"
        settings = Settings.load({}, rings=rings, ring_mib=2, agent=False, max_overhead_pct=100)
        lens.watch(model, optimizer, settings=settings)
        try:
            yield found
        finally:
            lens.detach()
            found += read_rings(rings)


def train(family: Family, model: Any, optimizer: Any) -> str:
    """One step; the loss, bit by bit."""
    torch.manual_seed(1)
    loss = family.loss(model)
    loss.backward()
    optimizer.step()
    return float(loss.detach()).hex()


def examine(family: Family) -> Found:
    """Train and generate with one family."""
    first = family.make()
    alone = train(family, first, torch.optim.SGD(first.parameters(), lr=0.01))
    model = family.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watched(model, optimizer) as recorded, given_to_experts(family, model) as given:
        loss = train(family, model, optimizer)
    counted = {vector["layer"]: list(vector["values"]) for vector in recorded[0].vectors}
    by_hand = tokens_of(given)
    equal = list(counted.values()) == by_hand
    request = generate(family, model) if family.kv_elements is not None else (None, None, None, None, None)
    return Found(
        family.name,
        type(model).__name__,
        len(counted),
        round(sum(map(sum, by_hand))),
        equal,
        loss == alone,
        *request,
    )


def generate(
    family: Family, model: Any
) -> tuple[float | None, int | None, float | None, float | None, bool | None]:
    """Bytes of keys and values, those by hand, times, and whether the experts' tokens at decode are right."""
    model.eval()
    now = [10**12]
    passes = [0]

    def go_on(*_: Any) -> None:
        now[0] += DECODE_NS if passes[0] else PREFILL_NS
        passes[0] += 1

    handle = model.lm_head.register_forward_hook(go_on)
    clock, requests._clock = requests._clock, lambda: now[0]
    try:
        with watched(model, None) as recorded, given_to_experts(family, model) as given:
            model.generate(torch.randint(3, 60, (BATCH, PROMPT)), max_new_tokens=NEW, do_sample=False)
    finally:
        requests._clock = clock
        handle.remove()
    found = recorded[0]
    value = {
        name: found.values(name) for name in ("infer.kv_cache.bytes", "infer.request.ttft", "infer.request.tpot")
    }
    kv, ttft, tpot = (rows[0][1] if rows else None for rows in value.values())
    decode = {
        record["layer"]: list(record["values"])
        for record in found.records
        if record.get("metric") == "infer.expert.tokens" and "decode" in str(record.get("labels"))
    }
    by_hand = tokens_of([calls[1:] for calls in given])
    kept = BATCH * (PROMPT + NEW - 1) * (family.kv_elements or 0) * 4
    ms = [None if seconds is None else round(seconds * 1e3, 6) for seconds in (ttft, tpot)]
    return kv, kept, ms[0], ms[1], list(decode.values()) == by_hand


def tried(family: Family) -> Found:
    """The family's row, whatever becomes of it."""
    try:
        return examine(family)
    except Exception as error:
        lens.detach()
        text = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
        return Found(family.name, "", 0, 0, False, False, None, None, None, None, None, text)


def document(found: list[Found], told: list[Run]) -> str:
    """The tables with how they were made."""
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "megatron-core"))
    right = sum(row.right for row in found)
    lines = [
        "# Routers\n",
        f"`make prove-routers`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores; python "
        f"{platform.python_version()}, {versions}. Small random models of the real classes, {LAYERS} mixture layers of "
        f"{EXPERTS} experts. By hand: what the experts themselves were given, the arithmetic of the configuration, a "
        "stopwatch.\n",
        f"**{right} of {len(found)} families are right in everything that is compared.**\n",
        "| family | class | routers found | tokens of one step, by hand | counts equal | loss with and without lens | "
        "keys and values, bytes (by hand) | TTFT, TPOT (7 ms, 2 ms by hand) | tokens at decode | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        times = "not asked" if row.kv_by_hand is None else f"{row.ttft_ms} ms, {row.tpot_ms} ms"
        kept = "not asked" if row.kv_by_hand is None else f"{row.kv_bytes:.0f} ({row.kv_by_hand})"
        decode = "not asked" if row.decode_equal is None else _word(row.decode_equal)
        lines.append(
            f"| {row.family} | {row.model} | {row.routers} of {LAYERS} | {row.tokens} | {_word(row.counts_equal)} | "
            f"{'the same bits' if row.losses_equal else 'DIFFER'} | {kept} | {times} | {decode} | "
            f"{'right' if row.right else 'WRONG ' + row.problem} |"
        )
    lines += [
        "\n## Compiled and distributed\n",
        "| program | graphs | graph breaks | counts equal | loss with and without lens | |",
        "|---|---|---|---|---|---|",
        *(run.line() for run in told),
        "",
    ]
    return "\n".join(lines)


def _word(equal: bool) -> str:
    return "equal" if equal else "DIFFER"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def main() -> int:
    """Command line; 1 when anything is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the tables here too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--only", nargs="*", help="families whose name contains one of these")
    arguments = parser.parse_args()
    words = [word.lower() for word in arguments.only or [""]]
    found = [tried(family) for family in FAMILIES if any(word in family.name.lower() for word in words)]
    told = [] if arguments.only else runs()
    text = document(found, told)
    if arguments.out:
        arguments.out.write_text(text)
    rows = {"families": [row._asdict() for row in found], "runs": [run._asdict() for run in told]}
    print(json.dumps(rows) if arguments.json else text)
    return int(not all(row.right for row in found) or not all(run.right for run in told))


if __name__ == "__main__":
    sys.exit(main())
