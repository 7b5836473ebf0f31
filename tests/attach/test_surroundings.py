"""A training in a container, of another user, or beside another server's agent: seen, or refused in plain words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lens.attach.facts import look
from lens.attach.preflight import NEWEST, OLDEST, judge
from lens.collectors.launch import take_lock
from lens.settings import Settings

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]
LOOP = "print('here', flush=True)\nwhile True: sum(range(1000))"
NOBODY = 65534
NOWHERE = "http://127.0.0.1:9"


def can_unshare() -> bool:
    words = ["unshare", "--mount", "--pid", "--fork", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(words, capture_output=True).returncode == 0


isolated = pytest.mark.skipif(not can_unshare(), reason="no namespaces may be made here: that takes root")


@contextmanager
def program(*words: str | Path, **more: Any) -> Iterator[int]:
    """A program that says when it is there; the process that said it."""
    child = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, **more)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"here\n"
        below = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        yield int(below[0]) if below else child.pid
    finally:
        child.kill()
        child.wait()


def attach(pid: int, folder: Path, *, python: str = sys.executable, **environment: str) -> tuple[str, str]:
    """Both outputs of `lens attach`. A thread that could not be stopped within a second is as it was, and is asked again."""
    environment = {
        **os.environ, "LENS_DATA": str(folder / "data"), "LENS_RINGS": str(folder / "rings"), "LENS_AGENT": "0",
        "LENS_HOST": "host0", **environment,
    }  # fmt: skip
    for _ in range(10):
        found = subprocess.run(
            [python, "-m", "lens", "attach", str(pid), "--server", NOWHERE, "--wait", "60"],
            capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment,
        )  # fmt: skip
        if "did not stop within" not in found.stdout:
            break
    return found.stdout, found.stderr


@isolated
def test_another_process_namespace_is_refused_with_the_number_inside() -> None:
    with program("unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", LOOP) as pid:
        refusal = judge(look(pid))
    assert refusal is not None
    assert refusal.rule == "process namespace"
    assert "where it is process 1" in refusal.reason
    assert refusal.fix.endswith("lens attach 1")


@isolated
def test_other_files_under_the_same_names_are_noticed_before_anything_is_done(tmp_path: Path) -> None:
    hiding = 'mount -t tmpfs none "$1"; exec "$2" -c "$3"'
    with program("unshare", "--mount", "sh", "-c", hiding, "sh", ROOT / "lens", sys.executable, LOOP) as pid:
        refusal = judge(look(pid))
        assert refusal is not None
        assert refusal.rule == "file system"
    rings = tmp_path / "rings"
    rings.mkdir(mode=0o700)
    with program("unshare", "--mount", "sh", "-c", hiding, "sh", rings, sys.executable, LOOP) as pid:
        said, _ = attach(pid, tmp_path)
    assert f"failed: it sees another {rings}" in said
    assert "stood still" not in said


@isolated
def test_the_same_files_under_another_root_are_found(tmp_path: Path) -> None:
    changing = 'mount --rbind / "$1"; exec chroot "$1" "$2" -c "$3"'
    root = tmp_path / "root"
    root.mkdir()
    with program("unshare", "--mount", "sh", "-c", changing, "sh", root, sys.executable, LOOP) as pid:
        said, errors = attach(pid, tmp_path)
    assert "failed: torch is not loaded in it" in said, errors  # its own word: the line ran in it


def python_of_everybody() -> str | None:
    """An interpreter that any user can run, and that can be attached to."""
    for minor in range(OLDEST[1], NEWEST[1] + 1):
        path = f"/usr/bin/python3.{minor}"
        if os.access(path, os.X_OK):
            return path
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root acts for others")
def test_root_writes_and_listens_as_the_training_s_own_user(tmp_path: Path) -> None:
    python = python_of_everybody()
    if python is None or not _readable(ROOT):
        pytest.skip("nobody else could run a Python or read lens here")
    place = Path("/dev/shm") / f"lens-test-{os.getpid()}"
    try:
        with program(python, "-c", LOOP, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/") as pid:
            said, errors = attach(
                pid, place, python=python, LENS_RINGS=str(place), PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=str(ROOT)
            )
        assert "failed: torch is not loaded in it" in said, errors
        assert place.stat().st_uid == NOBODY
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _readable(folder: Path) -> bool:
    return all(part.stat().st_mode & 0o005 == 0o005 for part in (folder, *folder.parents))


def test_an_agent_that_ships_elsewhere_is_named(tmp_path: Path) -> None:
    other = Settings.load(rings=tmp_path / "rings", host="host0", server="http://127.0.0.1:1234")
    with program(sys.executable, "-c", LOOP) as pid:
        lock = take_lock(other)
        assert lock is not None
        with lock:
            lock.tell(other)
            _, errors = attach(pid, tmp_path, LENS_AGENT="1")
            assert f"(process {os.getpid()}) ships to http://127.0.0.1:1234" in errors
            assert f"to have it at {NOWHERE}: kill {os.getpid()}" in errors
            lock.tell(Settings.load(rings=other.rings, host="host0", server=NOWHERE))
            assert "ships to" not in attach(pid, tmp_path, LENS_AGENT="1")[1]
