"""The other ways into a process: through gdb, by the interpreter's own means, by a socket that it has opened itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lens.attach import gdb, stacks, ways
from lens.attach.facts import look
from lens.attach.preflight import judge
from lens.attach.ptrace import TraceError
from lens.hooks import door
from lens.ring_files import start_ticks
from lens.settings import Settings
from tests.attach.test_inject import ALLOCATING, interpreters
from tests.attach.test_inject import running as running_code
from tests.attach.test_preflight import GOOD
from tests.waiting import wait_for

pytestmark = pytest.mark.processes


@pytest.mark.skipif(gdb.program() is None, reason="gdb is not installed here")
@pytest.mark.parametrize("program", [interpreters()[0], interpreters()[-1]])
def test_gdb_queues_a_line_that_is_run_once_and_the_target_goes_on(program: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running_code(program, ALLOCATING) as child:
        for number in range(2):
            stood = ways.GDB.run_line(child.pid, f"open({str(out)!r}, 'a').write('{number} ')", Settings())
            assert stood is not None
            assert stood > 0
            wait_for(lambda number=number: out.exists() and f"{number} " in out.read_text())
        assert child.poll() is None
    assert out.read_text() == "0 1 "


@pytest.mark.skipif(gdb.program() is None, reason="gdb is not installed here")
def test_gdb_says_why_it_could_not(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        with pytest.raises(TraceError, match="gdb could not do it"):
            ways.GDB.run_line(sleeper.pid, "pass", Settings())
        assert sleeper.poll() is None
        sleeper.kill()


def test_without_gdb_its_way_is_refused_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    refusal = ways.judge(GOOD, ways.GDB, Settings())
    assert refusal is not None
    assert (refusal.rule, "apt-get" in refusal.fix) == ("no gdb", True)
    assert judge(replace(GOOD, machine="riscv64"), ways.GDB.rules) is None


NEW = replace(GOOD, version=(3, 14), own_version=(3, 14), symbols=False, machine="aarch64")


def test_a_version_that_lets_others_in_is_entered_by_its_own_means() -> None:
    settings = Settings(rings=Path("/nonexistent"))
    assert ways.choose(NEW, settings) is ways.REMOTE_EXEC
    assert ways.choose(GOOD, settings) is ways.PENDING
    assert ways.judge(NEW, ways.REMOTE_EXEC, settings) is None
    refusal = ways.judge(replace(NEW, own_version=(3, 12)), ways.REMOTE_EXEC, settings)
    assert refusal is not None
    assert refusal.rule == "Python version"
    assert "python3.14 -m lens attach 4711" in refusal.fix


def test_the_script_for_it_is_private_and_removes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, ran = Settings(rings=tmp_path / "rings"), tmp_path / "ran"
    named: list[tuple[int, Path]] = []
    monkeypatch.setattr(sys, "remote_exec", lambda pid, path: named.append((pid, Path(path))), raising=False)
    ways.REMOTE_EXEC.run_line(4711, f"open({str(ran)!r}, 'w').write('x')", settings)
    ((pid, script),) = named
    assert (pid, script.stat().st_mode & 0o777) == (4711, 0o600)
    subprocess.run([sys.executable, "-c", f"exec(open({str(script)!r}).read())"], check=True)
    assert ran.exists()
    assert not script.exists()

    def refuses(pid: int, path: str) -> None:
        raise PermissionError("not permitted")

    monkeypatch.setattr(sys, "remote_exec", refuses, raising=False)
    with pytest.raises(TraceError, match="not permitted"):
        ways.REMOTE_EXEC.run_line(4711, "pass", settings)
    assert not list((tmp_path / "rings").iterdir())


DOOR = """
import os, sys, time
import lens
lens.watch(run="r") if sys.argv[1] == "watches" else lens.attachable()
print("open", flush=True)
def parked():
    time.sleep(1000)
if sys.argv[1] == "waits":
    parked()
elif sys.argv[1] == "watches":
    parked()
elif os.fork() == 0:
    os._exit(0)
else:
    os.wait()
    print("alone", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def opened(tmp_path: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", DOOR, *words], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True,
        env={**os.environ, "LENS_RINGS": str(tmp_path / "rings"), **environment},
    ) as child:  # fmt: skip
        assert child.stdout is not None
        try:
            child.stdout.readline()
            yield child
        finally:
            child.kill()


def test_a_process_tells_its_stacks_at_its_door_though_its_main_thread_is_parked(tmp_path: Path) -> None:
    settings = Settings(rings=tmp_path / "rings")
    with opened(tmp_path, "waits") as child:
        path = ways.door_of(child.pid, settings)
        assert path is not None
        assert path.stat().st_mode & 0o777 == 0o600
        # As where tracing is forbidden.
        facts = replace(look(child.pid), yama=3, descendant=False)

        def stands() -> list[str]:
            told = stacks.of_process(facts, settings, 60.0)
            assert (told.how, told.error) == ("asked", None)
            assert told.threads[0].main
            return [frame.name for frame in told.threads[0].frames]

        wait_for(lambda: stands() == ["parked", "<module>"])  # its word reaches us before it is parked
        # What makes no sense gets no answer and does no harm.
        for nonsense in (b"no json\n", b'{"ask": "dance"}\n', b""):
            with socket.socket(socket.AF_UNIX) as guest:
                guest.connect(str(path))
                guest.sendall(nonsense)
        assert stacks.of_process(facts, settings, 60.0).how == "asked"


def test_a_door_belongs_to_one_process_and_goes_with_it(tmp_path: Path) -> None:
    settings = Settings(rings=tmp_path / "rings")
    with opened(tmp_path, "forks") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "alone\n"
        assert ways.door_of(child.pid, settings) is not None  # though its child has ended
        child.communicate("end\n", timeout=60)
        assert child.returncode == 0
    assert not list((tmp_path / "rings").iterdir())
    for variable, found in (("1", True), ("", False)):
        with opened(tmp_path, "watches", LENS_ATTACH=variable, LENS_AGENT="0") as child:
            assert (ways.door_of(child.pid, settings) is not None) == found
    with opened(tmp_path, "waits", LENS_ATTACH="0") as child:
        assert ways.door_of(child.pid, settings) is None
        refusal = ways.judge(look(child.pid), ways.PENDING, settings)
        assert refusal is not None
        assert refusal.rule == "LENS_ATTACH=0"


def test_another_user_is_not_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_uid", lambda guest: os.geteuid() + 1 or 1)
    path = tmp_path / "rings" / f"door-{os.getpid()}-{start_ticks(os.getpid())}.sock"
    found = door.Door(path)
    try:
        asked = ways.ask_at_door(os.getpid(), Settings(rings=tmp_path / "rings"), {"ask": "stacks"}, 60.0)
        with pytest.raises(StopIteration):
            next(iter(asked))
    finally:
        found.close()


TRAINING = """
import sys, time, torch, lens
from pathlib import Path
lens.attachable()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
stop = Path(sys.argv[1])
(stop.parent / "ready").touch()
while not stop.exists():
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    time.sleep(0.002)
"""


def test_a_training_is_entered_by_its_door_without_standing_still(tmp_path: Path) -> None:
    environment = {**os.environ, "LENS_RINGS": str(tmp_path / "rings"), "LENS_DATA": str(tmp_path / "data")}

    def lens(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "lens", *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
        assert done.stdout, done.stderr
        reply: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return reply

    with subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path / "stop")], env=environment, stderr=subprocess.PIPE, text=True
    ) as training:
        wait_for((tmp_path / "ready").exists)
        (found,) = lens("attach", str(training.pid), "--server", "http://127.0.0.1:9", "--wait", "60")["processes"]
        assert (found["state"], found["stopped_ms"]) == ("watching", None), found
        assert lens("detach", str(training.pid), "--wait", "60")["processes"] == [
            {"pid": training.pid, "left": True}
        ]
        (tmp_path / "stop").touch()
        _, said = training.communicate(timeout=60)
        assert training.returncode == 0
        assert said.count("lens: attached by") == 1
