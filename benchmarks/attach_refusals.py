"""What `lens attach` says where it is refused, and how soon: every rule, on a real process that falls under it.

Where this machine cannot have the process (its kernel has no Yama, say) the real command runs with that one fact
replaced, and the table says so. A bare interpreter runs beside, since the command cannot be faster than Python starts.

    python benchmarks/attach_refusals.py [--times N] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from page_table import table

import lens
from lens.attach.facts import look
from lens.attach.ptrace import StoppedThread

LOOP = "import time\nprint('here', flush=True)\nwhile True: time.sleep(0.01)"
REPLACED = """
import sys
from dataclasses import replace
from lens.cli import attach
real = attach.look
attach.look = lambda pid: replace(real(pid), **{facts!r})
from lens.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
PACKAGE = Path(lens.__file__).parent


@dataclass(frozen=True)
class Case:
    """A rule, a process that falls under it, and the facts to replace where that process cannot be had."""

    rule: str
    target: Callable[[], AbstractContextManager[int]]
    """A context that gives the pid."""
    how: str
    facts: dict[str, object] = field(default_factory=dict)


@contextmanager
def process(*words: str | Path, **environment: str) -> Iterator[int]:
    """A process that says when it is there."""
    child = subprocess.Popen(
        [str(word) for word in words], env={**os.environ, **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        if not child.stdout.readline():
            raise SystemExit(f"{words[0]} did not start")
        yield child.pid
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


def python(**environment: str) -> Callable[[], AbstractContextManager[int]]:
    """A Python that could be attached to."""
    return lambda: process(sys.executable, "-c", LOOP, **environment)


@contextmanager
def ended() -> Iterator[int]:
    """One that is no more."""
    with process(sys.executable, "-c", LOOP) as pid:
        pass
    yield pid


@contextmanager
def stopped() -> Iterator[int]:
    """One that a signal has stopped."""
    with process(sys.executable, "-c", LOOP) as pid:
        os.kill(pid, 19)
        while look(pid).state != "T":
            time.sleep(0.01)
        yield pid


@contextmanager
def traced() -> Iterator[int]:
    """One that we trace meanwhile."""
    with process(sys.executable, "-c", LOOP) as pid, StoppedThread(pid, 5.0):
        yield pid


@contextmanager
def nameless() -> Iterator[int]:
    """One whose interpreter has no function of the name that is looked for."""
    with tempfile.TemporaryDirectory() as name:
        program = Path(sys.executable).resolve()
        libraries = [
            Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line
        ]
        library = next((path for path in libraries if "libpython3" in path.name), program)
        changed = Path(name) / library.name
        changed.write_bytes(library.read_bytes().replace(b"\0Py_AddPendingCall\0", b"\0Py_XddPendingCall\0"))
        changed.chmod(0o755)
        program = changed if library == program else program
        with process(program, "-c", LOOP, LD_LIBRARY_PATH=name, PYTHONHOME=sys.base_prefix) as pid:
            yield pid


@contextmanager
def below_unshare(options: str, before: str = ":") -> Iterator[int]:
    """One in namespaces of its own; `unshare` itself is its parent or becomes it."""
    program = f"{before}; exec {shlex.quote(sys.executable)} -c {shlex.quote(LOOP)}"
    with process("unshare", *options.split(), "sh", "-c", program) as pid:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        yield int(children[0]) if children else pid


def cases() -> Iterator[Case]:
    """Every rule, as this machine can show it."""
    root = os.geteuid() == 0
    old = _old_python()
    yield Case("no process", ended, "an ended process")
    yield Case("LENS_ATTACH=0", python(LENS_ATTACH="0"), "a real process")
    yield Case("other user", python(), "the fact replaced", {"own_uid": 1000, "owner": 1001, "capable": False})
    for scope, capable in ((1, False), (2, False), (3, True)):
        facts = {"yama": scope, "capable": capable, "descendant": False, "own_uid": 1000, "owner": 1000}
        yield Case(f"Yama {scope}", python(), "the fact replaced", facts)
    facts = {"yama": 1, "capable": False, "descendant": False, "own_uid": 0, "owner": 0}
    yield Case("Yama 1, root of a container", python(), "the fact replaced", facts)
    yield Case("already traced", traced, "a real process")
    yield Case("stopped", stopped, "a real process")
    yield Case("not readable", python(), "the fact replaced", {"readable": False})
    yield Case("architecture", python(), "the fact replaced", {"machine": "riscv64"})
    yield Case("not Python", lambda: process("sh", "-c", "echo here; exec sleep 600"), "a real process")
    if old:
        yield Case("Python version", lambda: process(old, "-c", LOOP), f"a real {Path(old).parents[1].name}")
    else:
        yield Case("Python version", python(), "the fact replaced", {"version": (3, 8)})
    yield Case("no symbols", nameless, "a real process")
    if root and shutil.which("unshare"):
        hidden = f"mount -t tmpfs none {shlex.quote(str(PACKAGE))}"
        yield Case(
            "process namespace", lambda: below_unshare("--pid --fork --kill-child --mount-proc"), "unshare --pid"
        )
        yield Case("file system", lambda: below_unshare("--mount", hidden), "unshare --mount")
    else:
        yield Case("process namespace", python(), "the fact replaced", {"inner_pid": 1})
        yield Case("file system", python(), "the fact replaced", {"sees_lens": False})


def _old_python() -> str | None:
    pyenv = Path(shutil.which("pyenv") or "/nowhere").resolve().parents[1] / "versions"
    return next((str(path) for path in sorted(pyenv.glob("3.[89].*/bin/python3"))), None)


@dataclass
class Answer:
    """What the command said, and what it took."""

    code: int
    text: str
    wall_ms: float
    processor_ms: float


def ask(words: list[str]) -> Answer:
    """Run a command to its end."""
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        child = subprocess.Popen(words, stdout=said, stderr=said, env={**os.environ, "LENS_AGENT": "0"})
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode()
    return Answer(child.returncode, text, 1e3 * wall, 1e3 * (usage.ru_utime + usage.ru_stime))


def row(case: Case, times: int) -> list[str]:
    """A line of the table.

    Raises:
        SystemExit: the command was not refused, or by another rule.
    """
    program = ["-c", REPLACED.format(facts=case.facts)] if case.facts else ["-m", "lens"]
    with case.target() as pid:
        answers, bare = [], []
        for _ in range(times):
            answers.append(ask([sys.executable, *program, "attach", str(pid)]))
            bare.append(ask([sys.executable, "-c", "pass"]))
        checked = ask([sys.executable, *program, "attach", "--check", "--json", str(pid)]).text
    rule = case.rule.split(",")[0]
    if answers[0].code == 0 or f'"rule": "{rule}"' not in checked:
        raise SystemExit(f"{case.rule} did not refuse: {answers[0].text} {checked}")
    reason, fix = _plain(answers[0].text, pid).split("\n")[:2]
    return [
        case.rule, case.how, f"{reason.removeprefix('lens: ')}<br>`{fix.strip()}`", str(answers[0].code),
        f"{median(a.wall_ms for a in answers):.0f}", f"{max(a.wall_ms for a in answers):.0f}",
        f"{median(a.processor_ms for a in answers):.0f}", f"{median(b.wall_ms for b in bare):.0f}",
    ]  # fmt: skip


def _plain(text: str, pid: int) -> str:
    """Without what is of this machine alone."""
    own = Path("/proc/self/cmdline").read_text().replace("\0", " ").strip()
    pairs = {
        own: "gdb", LOOP: "…", str(PACKAGE): ".../lens", sys.executable: "python3", str(pid): "PID",
        str(os.getpid()): "4711",
    }  # fmt: skip
    for found, shown in pairs.items():
        text = text.replace(found, shown)
    return re.sub(r"\S*/bin/python[\d.]*", "python3", text)


HEAD = ("rule", "shown on", "what is said", "exit code", "ms p50", "ms max", "processor ms", "bare Python, ms p50")


def main() -> int:
    """Ask everything, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=9, help="askings of each (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write the page there too")
    options = parser.parse_args()
    rows = [row(case, options.times) for case in cases()]
    page = (
        f"# What `lens attach` says where it is refused\n\n`python benchmarks/attach_refusals.py` on "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}, "
        f"{time.strftime('%Y-%m-%d')}; each asked {options.times} times, from the start of the command to its end.\n\n"
        + table(HEAD, rows)
        + "\n"
    )
    print(page)
    if options.out:
        options.out.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
