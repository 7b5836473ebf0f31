"""Compile the libraries, in a process of its own that imports the torch they are for.

    python -m lens.hooks.native.build [--background] [NAME ...]

A library is written under another name, proved in yet another process, and only then renamed to its own: a training
process meets it whole, or not at all. Who builds at the same time waits; in the background, gives up.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lens.hooks.native import cache
from lens.hooks.native.libraries import FLAGS, LIBRARIES, SOURCES, Library

COMPILERS = ("g++", "c++", "clang++")
COMPILE_S, PROOF_S = 1800, 300
NICENESS = 19
_TORCH_LIBRARIES = ("c10", "torch_cpu", "torch_python")
_MOST_OF_MESSAGE = 2000


class BuildError(RuntimeError):
    """A library cannot be built here; the message is one line that says why and what to do."""


def compiler() -> str | None:
    """The C++ compiler to use: CXX, else the first that is installed; None where there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, COMPILERS)), None)


def build(library: Library, wait: bool = True) -> Path | None:
    """Compile, prove and publish a library, unless it is there; None when another process is at it (`wait` false).

    Raises:
        BuildError: there is no compiler, it fails, or what it made does not work.
        CacheError: there is no safe place to keep it.
    """
    name = library.file_name()
    if name is None:
        raise BuildError("torch is not installed: pip install 'mistrallens[train]'")
    directory = cache.made()
    with _alone(directory / f"{name}.lock", wait) as mine:
        if not mine:
            return None
        found = cache.find(name)
        if found is not None:
            return found
        try:
            _publish(library, directory / name)
        except BuildError as error:
            cache.note_failure(name, str(error))
            raise
        cache.forget_failure(name)
    return directory / name


def _publish(library: Library, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        made = Path(scratch) / f"lens_{library.name}.so"
        _run([*_command(library), "-o", str(made)], "the compiler failed", COMPILE_S)
        made.chmod(0o600)
        proof = [sys.executable, "-m", "lens.hooks.native.prove", library.name, str(made)]
        _run(proof, "what was compiled does not work here", PROOF_S)
        made.replace(target)


def _command(library: Library) -> list[str]:
    program = compiler()
    if program is None:
        raise BuildError("no C++ compiler: install g++, or name one in CXX")
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise BuildError(f"no Python.h in {python}: install the headers of this Python (python3-dev)")
    command = [program, *FLAGS, f"-I{SOURCES}", f"-isystem{python}"]
    libraries: list[str] = []
    if library.torch:
        import torch

        if not torch.distributed.is_available():
            raise BuildError("this torch has no torch.distributed: there is nothing to observe")
        root = Path(torch.__file__).parent
        command.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
        command += [f"-isystem{root / 'include' / path}" for path in ("", "torch/csrc/api/include")]
        # No path to them is kept: they are found as what the training process has loaded already.
        libraries = [f"-L{root / 'lib'}", *(f"-l{name}" for name in _TORCH_LIBRARIES)]
    return [*command, str(SOURCES / library.sources[0]), *libraries]


def _run(command: Sequence[str], what_failed: str, limit_s: float) -> None:
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "LENS_AUTOLOAD": "0", "LENS_DISABLED": "1", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{what_failed}: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-_MOST_OF_MESSAGE:]
        raise BuildError(f"{what_failed} (exit code {done.returncode}): {said}")


@contextlib.contextmanager
def _alone(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock file that a killed builder gives back by itself."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what is named, or all that there is; the exit code."""
    parser = argparse.ArgumentParser(prog="lens.hooks.native.build", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(LIBRARIES), metavar="NAME", help=", ".join(LIBRARIES))
    parser.add_argument(
        "--background", action="store_true", help="lowest priority; not what failed or is under way"
    )
    options = parser.parse_args(arguments)
    if options.background:
        os.nice(NICENESS)
    code = 0
    for library in (LIBRARIES[name] for name in options.names):
        name = library.file_name()
        if options.background and (name is None or cache.failure(name)):
            continue
        try:
            build(library, wait=not options.background)
        except (BuildError, cache.CacheError, OSError) as error:
            print(f"{library.name}: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
