"""Which rule refuses an attach, and what it says; by the facts alone, and on real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from lens.attach import inject
from lens.attach.facts import Facts, look
from lens.attach.preflight import judge
from lens.attach.ptrace import StoppedThread, TraceError
from tests.waiting import wait_for

GOOD = Facts(
    4711, "R", owner=1000, own_uid=1000, version=(3, 12), symbols=True, torch=True, rank=0, world_size=8,
    command="python train.py",
)  # fmt: skip
REFUSED = {
    "no process": {"state": None},
    "LENS_ATTACH=0": {"forbidden": True},
    "other user": {"owner": 1001},
    "Yama 1": {"yama": 1},
    "Yama 2": {"yama": 2},
    "Yama 3": {"yama": 3, "capable": True},
    "already traced": {"tracer": 99},
    "stopped": {"state": "T"},
    "not readable": {"readable": False},
    "architecture": {"machine": "riscv64"},
    "not Python": {"version": None, "symbols": False},
    "Python version": {"version": (3, 8)},
    "no symbols": {"symbols": False},
    "process namespace": {"inner_pid": 7},
    "file system": {"sees_lens": False},
}


@pytest.mark.parametrize("rule", REFUSED)
def test_each_rule_refuses_by_its_name_and_says_what_to_do(rule: str) -> None:
    refusal = judge(replace(GOOD, **REFUSED[rule]))
    assert refusal is not None
    assert refusal.rule == rule
    assert len(refusal.reason) > 20
    # A command, of which a person need not guess a word.
    assert re.search(r"(lens attach (\d+|--check --all-ranks)|lens run -- python train.py)", refusal.fix)


@pytest.mark.parametrize(("user", "capable", "fix"), [(1000, False, "sudo "), (0, False, "--cap-add SYS_PTRACE")])
def test_root_of_a_container_is_not_sent_to_sudo(user: int, capable: bool, fix: str) -> None:
    refusal = judge(replace(GOOD, yama=1, owner=user, own_uid=user, capable=capable))
    assert refusal is not None
    assert fix in refusal.fix


@pytest.mark.parametrize(
    "allowed",
    [
        {},
        {"yama": 0},
        {"yama": 1, "descendant": True},
        {"yama": 1, "capable": True},
        {"yama": 2, "capable": True},
        {"own_uid": 0, "capable": True},
        {"yama": 2, "own_uid": 0, "capable": True},
    ],
)
def test_what_the_kernel_allows_is_not_refused(allowed: dict[str, object]) -> None:
    assert judge(replace(GOOD, **allowed)) is None


@contextmanager
def process(*words: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(words, env={**os.environ, **environment}, stdout=subprocess.PIPE)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


LOOP = "print('here', flush=True)\nwhile True: pass"


def rule_of(pid: int) -> str | None:
    refusal = judge(look(pid))
    return refusal.rule if refusal else None


def test_a_real_python_of_ours_can_be_attached_to() -> None:
    with process(sys.executable, "-c", LOOP) as child:
        assert child.stdout is not None
        child.stdout.readline()
        facts = look(child.pid)
        assert facts.version == sys.version_info[:2]
        assert facts.descendant
        assert judge(facts) is None


def test_real_processes_are_refused_for_what_they_are() -> None:
    with process("sleep", "600") as child:
        assert rule_of(child.pid) == "not Python"
    with process(sys.executable, "-c", LOOP, LENS_ATTACH="0") as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert rule_of(child.pid) == "LENS_ATTACH=0"
    with process(sys.executable, "-c", LOOP) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGSTOP)
        wait_for(lambda: look(child.pid).state == "T")
        assert rule_of(child.pid) == "stopped"
    with process(sys.executable, "-c", LOOP) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with StoppedThread(child.pid, 60.0):
            facts = look(child.pid)
            refusal = judge(facts)
            assert facts.tracer == os.getpid()
            assert refusal is not None
            assert refusal.rule == "already traced"
            assert f"process {os.getpid()} ({facts.tracer_command[:5]}" in refusal.reason
            with pytest.raises(TraceError, match="--cap-add SYS_PTRACE"):
                inject.run_line(child.pid, "pass")
    assert rule_of(2**22 + 1) == "no process"


def test_a_refusal_loads_nothing_that_only_an_attach_needs() -> None:
    program = (
        "import sys; from lens.cli.main import main; main(['attach', str(2**22 + 1)]); "
        "print(*(name for name in sys.modules if name.startswith('lens.')))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "there is no living process" in found.stderr
    loaded = set(found.stdout.split())
    assert "lens.attach.preflight" in loaded
    assert (
        loaded & {"lens.cli.run", "lens.cli.demo", "lens.attach.attached", "lens.reading", "lens.collectors"}
        == set()
    )
