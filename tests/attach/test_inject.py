"""A line queued in a running interpreter is run once, and the interpreter goes on, whichever version it is."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lens.attach import frames, inject, ptrace
from lens.attach.facts import look
from lens.attach.preflight import OLDEST, judge
from tests.waiting import wait_for

pytestmark = pytest.mark.processes
TIMES = 20
PATIENCE_S = 60.0
"""A busy machine may not let a thread stop within the second that is given to a training."""


def interpreters() -> list[str]:
    """One interpreter of each version that can be attached to, as far as this machine has them."""
    found: dict[str, str] = {f"3.{sys.version_info[1]}": sys.executable}
    pyenv = Path(shutil.which("pyenv") or "/nowhere").resolve().parents[1] / "versions"
    for minor in range(OLDEST[1], 14):
        here = sorted(pyenv.glob(f"3.{minor}.*/bin/python3"))
        name = shutil.which(f"python3.{minor}")
        if here:
            found.setdefault(f"3.{minor}", str(here[-1]))
        elif name and "shims" not in name:
            found.setdefault(f"3.{minor}", name)
    return list(found.values())


ALLOCATING = """
print('here', flush=True)
while True:
    kept = [{'n': n} for n in range(1000)]
"""
JOINING = """
import threading
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
print('here', flush=True)
thread.join()
"""


@contextmanager
def running(program: str, code: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([program, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    try:
        refusal = judge(look(child.pid))
        if refusal is not None and refusal.rule.startswith("Yama"):
            pytest.skip(f"this kernel forbids it: {refusal.reason}")
        yield child
    finally:
        child.kill()
        child.communicate()


def stands_in_a_join(pid: int) -> bool:
    facts = look(pid)
    assert facts.version is not None
    try:
        main = frames.read(pid, facts.version)[0]
    except frames.UnreadableError:
        return False  # still on its way
    return main.frames[0].file.endswith("threading.py") and look(pid).state == "S"


@pytest.mark.parametrize("program", interpreters())
def test_every_line_is_run_once_and_the_target_goes_on(program: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(program, ALLOCATING) as child:
        places = inject.locate(child.pid)
        for number in range(TIMES):
            inject.run_line(child.pid, f"open({str(out)!r}, 'a').write('{number} ')", places, PATIENCE_S)
            wait_for(lambda number=number: out.exists() and f"{number} " in out.read_text())
        assert child.poll() is None
    assert out.read_text().split() == [str(number) for number in range(TIMES)]


def test_a_main_thread_that_waits_for_another_is_woken_and_waits_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(sys.executable, JOINING) as child:
        wait_for(lambda: stands_in_a_join(child.pid))
        inject.run_line(child.pid, f"open({str(out)!r}, 'w').write('x')", patience_s=PATIENCE_S)
        assert inject.wake(child.pid, PATIENCE_S)
        wait_for(out.exists)
        time.sleep(0.2)
        assert child.poll() is None


def test_signals_sent_meanwhile_arrive_afterwards(tmp_path: Path) -> None:
    code = (
        "import signal\ncount = 0\ndef note(*_):\n    global count\n    count += 1\n"
        f"    open({str(tmp_path / 'count')!r}, 'w').write(str(count))\n"
        "signal.signal(signal.SIGUSR1, note)\n" + ALLOCATING
    )
    with running(sys.executable, code) as child:
        for number in range(1, 11):
            child.send_signal(10)
            inject.run_line(child.pid, "pass", patience_s=PATIENCE_S)
            count = tmp_path / "count"
            wait_for(lambda number=number, count=count: count.exists() and count.read_text() == str(number))
        assert child.poll() is None


def test_time_for_which_the_machine_let_us_stand_is_no_waiting_for_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, wait = itertools.count(), os.waitpid
    clock = SimpleNamespace(monotonic=itertools.count(0, 5).__next__, sleep=lambda _: None)

    def late(pid: int, options: int) -> tuple[int, int]:
        return (0, 0) if next(looks) < 10 else wait(pid, options & ~os.WNOHANG)

    with running(sys.executable, ALLOCATING) as child, monkeypatch.context() as patch:
        patch.setattr(ptrace, "time", clock)  # five seconds pass between two looks
        patch.setattr(os, "waitpid", late)
        with ptrace.StoppedThread(child.pid, 1.0) as thread:
            assert thread.registers()
        looks = itertools.count(-1_000)  # one that does not stop at all
        with pytest.raises(ptrace.TraceError, match="did not stop within 1 s"):
            ptrace.StoppedThread(child.pid, 1.0).__enter__()


def test_a_target_that_is_not_let_run_in_the_middle_of_the_call_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looks, wait = itertools.count(-1), os.waitpid
    clock = SimpleNamespace(monotonic=itertools.count(0, 5).__next__, sleep=lambda _: None)

    def late(pid: int, options: int) -> tuple[int, int]:
        # It stops at once; of what comes then nothing is seen a thousand times.
        return (0, 0) if next(looks) % 1_000 else wait(pid, options & ~os.WNOHANG)

    with running(sys.executable, ALLOCATING) as child:
        next(looks)
        with monkeypatch.context() as patch:
            patch.setattr(ptrace, "time", clock)
            patch.setattr(os, "waitpid", late)
            inject.run_line(child.pid, f"open({str(tmp_path / 'here')!r}, 'w').close()")
        wait_for((tmp_path / "here").exists)
        assert child.poll() is None
