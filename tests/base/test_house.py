"""The rooms of the house and who may import whom; what a training process may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LENS = ROOT / "lens"
BASE = {"records", "slots", "recorder", "ring_files", "ring_reader", "catalogue", "settings"}
"""What training processes load: the standard library only."""
COLUMNS = {"tables"}
"""Columns of records: base and numpy only."""
MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    **dict.fromkeys(COLUMNS, BASE),
    "hooks": BASE,
    "collectors": BASE | {"attach"},
    "attach": BASE | {"hooks"},
    "diagnosis": BASE | COLUMNS,
    "traces": BASE | COLUMNS,
    "store": BASE | COLUMNS | {"diagnosis", "traces"},
    "reading": BASE | {"store"},
    "dashboard": BASE | COLUMNS | {"store", "diagnosis"},
    "cli": BASE
    | COLUMNS
    | {"hooks", "collectors", "attach", "diagnosis", "traces", "store", "reading", "dashboard"},
    "__init__": BASE | {"hooks", "reading"},
    "__main__": {"cli"},
}
FOREIGN: dict[str, set[str]] = {
    **{name: set() for name in BASE},
    "tables": {"numpy"},
    "hooks": {"torch"},
    "collectors": {"psutil", "pynvml", "amdsmi", "tomli", "zstandard"},
    "diagnosis": {"numpy"},
    "traces": {"numpy"},
}
"""Packages from elsewhere that a room may import; rooms not named here may import any."""
CALLBACKS = "hooks/frameworks"
"""Each file of this folder may import the framework that it is named after: it is loaded when that callback is asked for."""
LAZY_BASE_EXTRAS = {"settings": {"tomli"}}


def room_of(path: Path) -> str:
    return path.relative_to(LENS).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            if node.module == "lens":
                yield from (f"lens.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


FILES = sorted(LENS.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is not a room of the house"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "lens":
            target = rest[0] if rest else "__init__"
            public = target in ("__init__", "__version__")
            assert target == room or target in MAY_IMPORT[room] or public, f"{room} imports {name}"
        elif room in FOREIGN and top not in sys.stdlib_module_names:
            allowed = FOREIGN[room] | LAZY_BASE_EXTRAS.get(room, set())
            if path.is_relative_to(LENS / CALLBACKS):
                allowed = allowed | {path.stem, f"pytorch_{path.stem}"}
            assert top in allowed, f"{room} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "sample_runs").rglob("*.py")), ids=lambda path: path.name)
def test_sample_runs_use_only_the_public_api(path: Path) -> None:
    assert all(name == "lens" or not name.startswith("lens.") or name.count(".") == 1 for name in imports(path))


HEAVY = ("torch", "numpy", "chdb", "dash", "fastapi", "pandas", "pyarrow", "plotly", "psutil", "pynvml")


@pytest.mark.parametrize("module", ["lens", "lens.hooks.api", "lens.reading", "lens.cli.main"])
def test_importing_pulls_in_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_no_file_names_a_machine_or_a_registry() -> None:
    words = ["/wo" + "rk/", "/ro" + "ot/", "py" + "pi.org", "np" + "mjs.org", "python" + "hosted"]
    for suffix in ("py", "toml", "md", "js", "css"):
        for path in ROOT.rglob(f"*.{suffix}"):
            if {".venv", "build", "node_modules", "vendor"} & set(path.relative_to(ROOT).parts):
                continue
            text = path.read_text(errors="replace")
            assert not [word for word in words if word in text], path
