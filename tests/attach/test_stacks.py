"""Where a process stands in its Python code is read without its help, and told for all ranks together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from lens.attach import frames, line_tables, stacks, standing
from lens.attach.facts import look
from lens.attach.frames import Frame, ThreadStack, UnreadableError
from lens.attach.layouts import LAYOUTS
from lens.attach.ptrace import TraceError
from lens.attach.stacks import ProcessStacks
from lens.settings import Settings
from tests.attach.test_inject import interpreters
from tests.waiting import wait_for

pytestmark = pytest.mark.processes
T = TypeVar("T")

WAITING = """
import json, sys, threading
event = threading.Event()
def here(frame):
    found = []
    while frame is not None:
        code = frame.f_code
        found.append([code.co_filename, frame.f_lineno, getattr(code, "co_qualname", code.co_name)])
        frame = frame.f_back
    return found
class Löwe:
    def schläft(self, _):
        print(json.dumps(here(sys._getframe())), flush=True); event.wait()
    @property
    def still(self):
        return sorted([1], key=self.schläft)  # C code lies between these two
def outer():
    try:
        return [
            number
            for number in (
                Löwe()
                .still
            )
        ]
    finally:
        pass
threading.Thread(target=lambda: event.wait(), daemon=True).start()
outer()
"""
BUSY = """
def inner(n):
    return [{'n': k} for k in range(n)]
def outer():
    print('here', flush=True)
    while True:
        inner(3)
        inner(4)
outer()
"""
LINES = """
import importlib.util, sys, types
spec = importlib.util.spec_from_file_location("line_tables", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import argparse, ast
def codes(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)
seen = 0
for known in (argparse, ast):
    for code in codes(compile(open(known.__file__).read(), known.__file__, "exec")):
        for begin, end, line in code.co_lines():
            for offset in {begin, end - 2}:
                found = module.line_of(sys.version_info[:2], code.co_linetable, code.co_firstlineno, offset)
                assert found == line, (code, offset, found, line)
                seen += 1
print(seen)
"""


@contextmanager
def running(program: str, *words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process, and the first line that it has printed."""
    with subprocess.Popen(
        [program, *words], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as child:
        try:
            assert child.stdout is not None
            yield child, child.stdout.readline()
        finally:
            child.kill()


def version_of(pid: int) -> tuple[int, int]:
    facts = look(pid)
    assert facts.version is not None
    return facts.version


def patiently(act: Callable[[], T]) -> T:
    """A thread that a busy machine does not let stop within a second is left as it was, and tried again."""
    for _ in range(9):
        try:
            return act()
        except (TraceError, UnreadableError) as error:
            if "not stop within" not in str(error) and "could not be stopped" not in str(error):
                raise
    return act()


@pytest.mark.parametrize("program", interpreters())
def test_the_stack_read_from_outside_is_the_one_the_program_sees_itself(program: str, tmp_path: Path) -> None:
    script = tmp_path / "wäit.py"
    script.write_text(WAITING)
    with running(program, str(script)) as (child, said):
        expected = [Frame(*one) for one in json.loads(said)]
        expected = [frame for frame in expected if frame.name != "here"]

        def when_it_waits() -> list[ThreadStack]:
            found = patiently(lambda: frames.read(child.pid, version_of(child.pid)))
            deeper = found[0].frames[: -len(expected)]
            return found if deeper and deeper[-1].name.endswith("wait") else []

        # One call deeper than where it looked at itself: its word reaches us before it is there.
        read = wait_for(when_it_waits)
        (main,) = (thread for thread in read if thread.main)
        assert main.native == child.pid
        assert list(main.frames[-len(expected) :]) == expected
        assert len(read) == 2
        assert read[1].frames[-1].file.endswith("threading.py")
        # It says the same when it is asked.
        settings = Settings.load(rings=tmp_path / "rings")
        asked = patiently(lambda: stacks.asked(child.pid, settings, 60.0))
        assert asked[0].main
        assert list(asked[0].frames[-len(expected) :]) == expected
        assert not list((tmp_path / "rings").iterdir())


@pytest.mark.parametrize("program", interpreters())
def test_the_line_of_every_instruction_is_the_compilers(program: str) -> None:
    command = [program, "-c", LINES, line_tables.__file__]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) > 5_000


def test_a_stack_that_changes_all_the_time_is_read_whole(tmp_path: Path) -> None:
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    seen = set()
    with running(sys.executable, str(script)) as (child, _):

        def read() -> int:
            (main,) = patiently(lambda: frames.read(child.pid, version_of(child.pid)))
            names = [frame.name for frame in reversed(main.frames)]
            assert names[:2] == ["<module>", "outer"]
            assert set(names[2:]) <= {"inner", "inner.<locals>.<listcomp>"}
            assert main.frames[-2].line in (5, 6, 7, 8)
            seen.add(tuple(names))
            return len(seen)

        for _ in range(100):
            read()
        wait_for(lambda: read() > 1)  # it may not have been let run meanwhile
        assert child.poll() is None


RANK = """
import mmap, sys, time
# What tells that torch is loaded is that this file is mapped; loading it takes seconds.
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
def all_reduce():
    print("here", flush=True); time.sleep(1000)
def load():
    print("here", flush=True); time.sleep(1000)
def step():
    all_reduce() if sys.argv[2] == "waits" else load()
step()
"""


def test_ranks_that_stand_alike_are_told_together_and_who_was_not_read_says_why(tmp_path: Path) -> None:
    library, script = tmp_path / "libtorch.so", tmp_path / "train.py"
    library.write_bytes(b"\0" * 4096)
    script.write_text(RANK)
    with ExitStack() as until_done:
        for rank in range(5):
            until_done.enter_context(
                running(
                    sys.executable, str(script), str(library), "loads" if rank == 2 else "waits", RANK=str(rank),
                    WORLD_SIZE="5", **({"LENS_ATTACH": "0"} if rank == 4 else {}),
                )
            )  # fmt: skip
        command = [sys.executable, "-m", "lens", "attach", "--stacks", "--all-ranks", str(os.getpid())]
        found = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=100)
        assert found.returncode == 1, found.stderr
        reply = json.loads(found.stdout)
        assert [group["ranks"] for group in reply["groups"]] == [[0, 1, 3], [2]]
        first, second = (group["where"] for group in reply["groups"])
        assert (first, second) == ("train.py:7 in all_reduce", "train.py:9 in load")
        unread = [process for process in reply["processes"] if process["error"]]
        assert [process["rank"] for process in unread] == [4]
        assert "LENS_ATTACH=0" in unread[0]["error"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=100).stdout
        assert "ranks 0, 1, 3  train.py:7 in all_reduce (" in told
        assert "rank 4         not read: process" in told


TORCH = "/env/lib/python3.11/site-packages/torch/"
STEP = (Frame("/home/me/train.py", 88, "step"), Frame("/home/me/train.py", 120, "<module>"))


@pytest.mark.parametrize(
    ("within", "said"),
    [
        (
            [
                Frame(TORCH + "distributed/distributed_c10d.py", 2806, "all_reduce"),
                Frame(TORCH + "distributed/c10d_logger.py", 81, "_exception_logger.<locals>.wrapper"),
            ],
            "all_reduce at train.py:88 in step",
        ),
        ([Frame("/env/lib/python3.11/threading.py", 320, "Event.wait")], "Event.wait at train.py:88 in step"),
        (
            [
                Frame("/home/me/model.py", 3, "<module>"),
                Frame("<frozen importlib._bootstrap>", 241, "_call_with_frames_removed"),
                Frame("<frozen importlib._bootstrap>", 1204, "_gcd_import"),
            ],
            "import at train.py:88 in step",
        ),
        ([Frame("/env/lib/python3.11/site-packages/megatron/comm.py", 5, "send")], "comm.py:5 in send"),
        ([], "train.py:88 in step"),
    ],
)
def test_a_place_is_told_in_the_trainings_own_lines(within: list[Frame], said: str) -> None:
    assert str(standing.place_of([*within, *STEP])) == said


def test_ranks_in_different_calls_of_one_line_stand_apart() -> None:
    def process(rank: int, called: str) -> ProcessStacks:
        stack = (Frame(TORCH + "nn/x.py", 1, called), *STEP)
        return ProcessStacks(rank, rank, "read", "S", (ThreadStack(rank, True, stack),))

    found = standing.groups([process(0, "barrier"), process(1, "all_reduce"), process(2, "all_reduce")])
    assert [[one.rank for one in group.members] for group in found] == [[1, 2], [0]]


def test_a_version_whose_stacks_are_unknown_is_not_guessed_at() -> None:
    with pytest.raises(frames.UnreadableError, match=r"3\.99"):
        frames.read(os.getpid(), (3, 99))
    assert min(LAYOUTS) == (3, 10)
