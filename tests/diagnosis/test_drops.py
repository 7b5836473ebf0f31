"""Dropped tokens are named when the share beyond the capacity rises and stays, and at no other time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lens.diagnosis import diagnose
from lens.tables import TablesBuilder

MS = 1_000_000
ROUTED = 4096.0
CALM, HIGH_ALONG = [0.06] * 90, [0.3] * 90
SETTLING = [0.4 * 0.95**step for step in range(90)]
BURSTS = [0.3 if step % 30 < 4 else 0.03 for step in range(90)]


def judged(rates: list[float], seed: int = 0, told: bool = True) -> dict[str, Any]:
    """Four ranks and two layers whose routers drop such a share in each step, give or take what chance gives."""
    random = np.random.default_rng(seed)
    builder, totals = TablesBuilder(), np.zeros((4, 2, 2))
    for step, rate in enumerate(rates):
        at = step * 100 * MS
        for rank in range(4):
            whose = {"rank": rank, "step": step}
            builder.add(
                {"type": "span", "kind": "step", "name": "step", "t0_ns": at, "t1_ns": at + 100 * MS, **whose}
            )
            for layer in range(2):
                share = float(np.clip(rate * random.lognormal(0, 0.4), 0, 1))
                totals[rank, layer] += (share * ROUTED, ROUTED)
                for name, value in zip(("dropped", "routed"), totals[rank, layer].tolist(), strict=True):
                    if told or name == "routed":
                        builder.add({"type": "sample", "metric": f"moe.tokens.{name}", "value": value, **whose,
                                     "t_ns": at + 90 * MS, "labels": {"layer": str(layer)}})  # fmt: skip
    return diagnose({"run": "drops", "world_size": 4}, builder.build())


@pytest.mark.parametrize("seed", range(3))
def test_a_share_that_rises_and_stays_is_named_with_its_step(seed: int) -> None:
    reply = judged([0.04] * 50 + [0.2] * 40, seed)
    found = reply["hypotheses"]
    assert [each["cause"] for each in found] == ["dropped_tokens"]
    assert abs(found[0]["onset_step"] - 50) <= 2
    assert found[0]["ranks"] == []


@pytest.mark.parametrize("rates", [CALM, HIGH_ALONG, SETTLING, BURSTS], ids=["calm", "high", "settling", "bursts"])
@pytest.mark.parametrize("seed", range(2))
def test_what_routers_do_anyway_is_no_finding(rates: list[float], seed: int) -> None:
    assert judged(rates, seed)["hypotheses"] == []


def test_routers_that_do_not_count_drops_say_nothing() -> None:
    assert judged([0.04] * 50 + [0.2] * 40, told=False)["hypotheses"] == []
