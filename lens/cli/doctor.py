"""What works here and what does not, with one line that says how to mend it.

Exit code 0 when training can be recorded, 4 when it cannot.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass

from lens.cli.errors import DONE, MISSING, CommandError
from lens.cli.options import add_data, add_server, settings_of
from lens.cli.reader import ServerReader
from lens.reading.connection import owner_of
from lens.settings import Settings

HELP = "what works here and what is missing"


@dataclass(frozen=True)
class Check:
    """One thing looked at: `state` is ok, absent (lens works without it) or broken."""

    name: str
    state: str
    found: str
    advice: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_data(parser)
    add_server(parser)
    parser.add_argument(
        "--build", action="store_true", help="compile what the hook can use for this torch (once, about a minute)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Look and tell."""
    settings = settings_of(arguments)
    if arguments.build:
        _build(arguments.json)
    checks = [
        _python(), _system(), _rings(settings), *_native(settings), _server(settings), _cards(), *_packages(),
    ]  # fmt: skip
    broken = any(check.state == "broken" for check in checks)
    if arguments.json:
        print(json.dumps({"ok": not broken, "checks": [asdict(check) for check in checks]}))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            advice = f"  → {check.advice}" if check.advice else ""
            print(f"{check.state:<7} {check.name.ljust(width)}  {check.found}{advice}")
    return MISSING if broken else DONE


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info >= (3, 10) and platform.python_implementation() == "CPython":
        return Check("python", "ok", found)
    return Check("python", "broken", found, "use CPython 3.10 or newer")


def _system() -> Check:
    found = f"{platform.system()} {platform.machine()}"
    if platform.system() == "Linux":
        return Check("system", "ok", found)
    return Check("system", "absent", found, "training and agent need Linux; a server runs here")


def _rings(settings: Settings) -> Check:
    from lens.ring_files import RecorderError, private_directory

    try:
        private_directory(settings.rings)
    except RecorderError as error:
        return Check("rings", "broken", str(settings.rings), str(error))
    free = shutil.disk_usage(settings.rings).free
    found = f"{settings.rings}, {free / 2**20:.0f} MiB free, {settings.ring_mib} MiB a rank"
    if free < 2 * settings.ring_mib * 2**20:
        return Check("rings", "broken", found, "set LENS_RINGS to a local disk with room")
    return Check("rings", "ok", found)


def _build(quiet: bool) -> None:
    """Build what is not built; how it went stands in the check, like what was built long ago."""
    from lens.hooks.native import build, cache
    from lens.hooks.native.libraries import LIBRARIES

    for library in LIBRARIES.values():
        if not quiet:
            print(f"building {library.name} ({library.does}) …", file=sys.stderr, flush=True)
        try:
            build.build(library)
        except (build.BuildError, cache.CacheError):
            continue


def _native(settings: Settings) -> list[Check]:
    """What is compiled for this torch, and what of the training is not seen without it."""
    from lens.hooks.native import build, cache
    from lens.hooks.native.libraries import LIBRARIES

    if not settings.native:
        return [Check("native", "absent", "switched off (LENS_NATIVE=0)")]
    checks = []
    for library in LIBRARIES.values():
        name, file_name = f"native {library.name}", library.file_name()
        if file_name is None:
            continue  # without torch there is nothing to train
        try:
            if cache.find(file_name):
                checks.append(Check(name, "ok", f"built: {library.does}"))
                continue
            failure = cache.failure(file_name)
        except (OSError, cache.CacheError) as error:
            checks.append(Check(name, "absent", f"refused: {error}", library.without))
            continue
        if failure:
            checks.append(Check(name, "absent", f"not built: {failure}", library.without))
        elif build.compiler() is None:
            checks.append(Check(name, "absent", "no C++ compiler", f"install g++; until then {library.without}"))
        else:
            checks.append(Check(name, "absent", f"not built; until then {library.without}", "lens doctor --build"))
    return checks


def _server(settings: Settings) -> Check:
    owner = owner_of(settings.data)
    url = settings.server or (owner or {}).get("url")
    if not url:
        return Check("server", "absent", f"none owns {settings.data}", "start one with: lens serve")
    try:
        runs = ServerReader(url, settings.read_token()).runs()
    except CommandError as error:
        said = str(error) if url in str(error) else f"{url}: {error}"
        return Check("server", "absent", said, error.hint)
    return Check("server", "ok", f"{url}, {len(runs)} runs")


def _cards() -> Check:
    try:
        import pynvml

        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        pynvml.nvmlShutdown()
        return Check("NVIDIA cards", "ok", str(count))
    except ImportError:
        return Check("NVIDIA cards", "absent", "no pynvml", "pip install nvidia-ml-py")
    except Exception as error:  # every NVML failure, and there are many, means the same here
        return Check("NVIDIA cards", "absent", f"none ({error})")


PACKAGES = {
    "torch": ("torch", "train"),
    "chdb": ("store", "server"),
    "fastapi": ("server", "server"),
    "dash": ("pages", "server"),
    "psutil": ("host metrics", "all"),
    "zstandard": ("smaller batches", "server"),
}


def _packages() -> list[Check]:
    checks = []
    for package, (purpose, extra) in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            checks.append(Check(package, "absent", f"no {purpose}", f"pip install 'mistrallens[{extra}]'"))
        else:
            checks.append(Check(package, "ok", f"{importlib.metadata.version(package)} ({purpose})"))
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    state = "ok" if chromium else "absent"
    checks.append(
        Check("chromium", state, chromium or "page tests are skipped", "" if chromium else "apt install chromium")
    )
    checks.append(
        Check(
            "processors",
            "ok",
            str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        )
    )
    return checks
