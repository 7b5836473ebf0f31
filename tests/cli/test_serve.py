"""A run that was recorded before there was a server appears once there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINING = """
import torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(5):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
"""


@pytest.mark.processes
def test_what_was_recorded_without_a_server_is_there_once_it_is_served(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LENS_")}
    environment = {**clean, "LENS_RINGS": str(tmp_path / "rings"), "LENS_AGENT_LINGER": "1", "LENS_HOST": "alone"}

    def lens(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lens", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    done = lens("run", "--run", "early", "--", sys.executable, "train.py")
    assert done.returncode == 0, done.stderr
    assert "until a server is there" in done.stderr
    spool = tmp_path / "lens-data" / "spool" / "alone"
    end = time.monotonic() + 90
    while "for the next agent" not in (log := (spool / "agent.log").read_text()):
        assert time.monotonic() < end, log
        time.sleep(0.2)

    command = [sys.executable, "-m", "lens", "serve", "--port", "0", "--json"]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        end = time.monotonic() + 90
        while True:
            runs = json.loads(lens("list", "--json").stdout)["runs"]
            if runs and runs[0]["last_step"] == 4:
                break
            assert time.monotonic() < end, runs
            time.sleep(0.3)
        assert runs[0]["run"] == "early"
    finally:
        server.terminate()
        server.wait(120)
