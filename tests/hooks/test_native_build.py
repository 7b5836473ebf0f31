"""Compiled libraries: kept where only the user can write, loaded only from there, and never missed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lens.hooks import native
from lens.hooks.native import build, cache
from lens.hooks.native.libraries import LIBRARIES, Library

LIBRARY = Library("observer", LIBRARIES["observer"].sources, True, "", "")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that stands for a built library, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = LIBRARY.file_name()
    assert name is not None
    path = cache.made() / name
    path.write_bytes(b"built")
    path.chmod(0o600)
    return path


def test_the_cache_is_for_its_user_alone(kept: Path) -> None:
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert native.built("observer") == kept


def make_link(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.chmod(0o620),
        lambda path: path.parent.chmod(0o770),
        make_link,
        lambda path: make_link(path.parent),
        lambda path: os.chown(path, 12345, -1),
    ],
    ids=["file of a group", "folder of a group", "file is a link", "folder is a link", "another owner"],
)
def test_what_others_could_have_written_is_refused(spoil: Callable[[Path], None], kept: Path) -> None:
    if os.getuid() != 0 and "chown" in spoil.__code__.co_names:
        pytest.skip("only root can give a file away")
    spoil(kept)
    assert native.built("observer") is None
    with pytest.raises(cache.CacheError):
        cache.find(kept.name)


def test_a_file_that_is_no_library_is_passed_over(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lens_observer", raising=False)
    assert native.load("observer") is None


def test_without_a_compiler_the_build_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"install g\+\+"):
        build.build(LIBRARIES["observer"])
    name = LIBRARIES["observer"].file_name()
    assert name is not None
    assert "install g++" in (cache.failure(name) or "")
    assert not list(cache.folder().glob("*.so"))


def test_another_source_or_torch_has_another_name() -> None:
    other = LIBRARY._replace(sources=("ring.hpp",))
    assert other.file_name() != LIBRARY.file_name() == LIBRARIES["observer"].file_name()


def test_looking_for_a_library_imports_nothing_heavy() -> None:
    script = "import sys; from lens.hooks import native; native.load('observer'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
