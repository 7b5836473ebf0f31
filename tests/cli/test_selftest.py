"""lens selftest: the scorecard's arithmetic, and the verb on a few cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lens.cli.errors import DONE, MISSING, UNUSABLE
from lens.cli.main import main
from lens.cli.scorecard import Calm, Judged, Paired, calibration_error, describe, scorecard
from tests.store.processes import TOKEN, Server

ROOT = Path(__file__).resolve().parents[2]


def judged(cause: str, *causes: str, **more: Any) -> Judged:
    about: dict[str, Any] = {
        "fault": cause, "noise": "clean", "world": 16, "ranks": [3], "onset": 50, "cost": 0.3, "said_ranks": [3],
        "confidence": 0.9, "detected": 54,
    }  # fmt: skip
    return Judged(cause=cause, causes=list(causes), **{**about, **more})


CASES = [
    judged("slow_link", "slow_link"),
    judged("slow_link", "slow_device", "slow_link", confidence=0.6),
    judged("slow_device", "slow_device", said_ranks=[4], detected=60),
    judged("slow_device", cost=0.02, confidence=None, said_ranks=[], detected=None),
    judged("unexplained", "unexplained", fault="odd_card"),
    judged("unexplained", "slow_device", fault="odd_card"),
]
CALM = [Calm("spiky", 2000, ["slow_link"], [0.5]), Calm("clean", 2000, [], [])]


def test_shares_count_what_they_say() -> None:
    card = scorecard(CASES, CALM)
    assert (card["cases"], card["cases_too_cheap"]) == (5, 1)
    assert card["top1"] == pytest.approx(2 / 3)
    assert card["cause_and_ranks"] == pytest.approx(1 / 3)
    assert card["rank_exact"] == pytest.approx(2 / 3)
    assert card["unknown_flagged"] == 0.5
    assert card["latency_steps_median"] == 7
    assert card["false_alarms_per_1k"] == 0.25
    assert card["noise"]["spiky"] == {"steps": 2000, "per_1000": 0.5, "alarms": {"slow_link": 1}}
    assert (card["causes"]["slow_link"]["recall"], card["causes"]["slow_link"]["top1"]) == (1.0, 0.5)
    assert card["causes"]["slow_device"]["precision"] == pytest.approx(1 / 3)
    assert card["look_alikes"]["GPU / link"]["slow_link"] == {"cases": 2, "right": 1, "as_slow_device": 1}


def test_of_two_faults_both_must_be_said() -> None:
    truth = [("slow_device", [1], 0.3), ("slow_link", [4], 0.2)]
    cheap = [("slow_device", [1], 0.3), ("slow_link", [4], 0.01)]
    told = [("slow_link", [4]), ("slow_device", [1])]
    paired = [
        Paired("clean", truth, told), Paired("clean", truth, [("congestion", [0]), *told[1:]]),
        Paired("clean", cheap, told[1:]),
    ]  # fmt: skip
    pairs = scorecard([], [], paired)["pairs"]
    assert pairs == {
        "cases": 2,
        "both_named": 0.5,
        "one_named_first": 0.5,
        "others_said": 1,
        "missed": {"slow_link": 1},
    }


def test_calibration_is_the_distance_of_confidence_from_being_right() -> None:
    assert calibration_error([(0.9, True)] * 9 + [(0.9, False)]) == pytest.approx(0)
    assert calibration_error([(0.9, False)] * 4) == pytest.approx(0.9)
    assert calibration_error([(1.0, True), (0.5, False)]) == pytest.approx(0.25)
    assert calibration_error([]) is None


def test_nothing_to_share_is_no_number() -> None:
    card = scorecard([], [])
    assert card["top1"] is None
    assert card["false_alarms_per_1k"] is None
    assert "| cause named first | - |" in describe(card)


def test_the_verb_judges_simulated_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--cases", "3", "--healthy-steps", "80", "--pairs", "1", "--services", "1", "--seed", "2", "--json"]
    assert main(["selftest", *words]) == DONE
    card = json.loads(capsys.readouterr().out)
    assert [one["fault"] for one in card["judged"]] == ["slow_device", "thermal_throttle", "power_cap"]
    assert all(one["causes"][0] == one["cause"] and one["said_ranks"] == one["ranks"] for one in card["judged"])
    assert (card["seed"], card["healthy_steps"], card["top1"]) == (2, 80, 1.0)
    assert [[cause for cause, _, _ in pair["truth"]] for pair in card["paired"]] == [
        ["ecc_remap", "thermal_throttle"]
    ]
    (served,) = card["services"]["judged"]
    assert (served["causes"], served["said_ranks"]) == (["kv_cache_exhausted"], served["ranks"])
    assert card["services"]["cases"] == 1


def test_without_the_simulator_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sample_runs.cluster", None)
    assert main(["selftest"]) == MISSING
    assert "sample_runs" in capsys.readouterr().err
    assert main(["selftest", "--cases", "-1"]) == UNUSABLE


@pytest.mark.processes
def test_a_simulated_run_is_sent_to_a_server_and_judged_there(server: Server) -> None:
    url = f"http://127.0.0.1:{server.port}"
    words = ["--ranks", "16", "--steps", "80", "--fault", "slow_link@40:3", "--seed", "1", "--run", "sent"]
    sent = subprocess.run(
        [sys.executable, "-m", "sample_runs.cluster", *words, "--server", url],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "LENS_TOKEN": TOKEN},
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    with server.client() as client:
        first = client.get("/api/v1/runs/sent/diagnosis").json()["hypotheses"][0]
    assert (first["cause"], first["ranks"]) == ("slow_link", [3])
    refused = subprocess.run(
        [sys.executable, "-m", "sample_runs.cluster", *words, "--server", url, "--token", "wrong"],
        capture_output=True, text=True, cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "LENS_TOKEN"},
    )  # fmt: skip
    assert (refused.returncode, "the token is wrong" in refused.stderr) == (1, True)
