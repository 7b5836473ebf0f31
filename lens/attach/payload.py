"""What runs in the target: load lens from where it lies, and let the ordinary hooks begin in the thread that trains.

Read by its path in a thread of its own, which ends once everything is in place. Nothing here may raise into the
target, and nothing but the standard library is imported in it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def line(report: Path, settings: Mapping[str, Any], attacher: str) -> str:
    """The line of Python that the target is to run. It never raises, and does nothing but start a thread.

    Args:
        report: file into which the target writes what came of it; see `Report`.
        settings: what its `lens.settings.Settings` shall be.
        attacher: who attaches, for the line on the target's standard error.
    """
    arguments = f"{str(report)!r}, {json.dumps(dict(settings))!r}, {attacher!r}"
    boot = (
        "from importlib.util import module_from_spec as make, spec_from_file_location as find\n"
        f"        spec = find('_lens_payload', {str(Path(__file__).resolve())!r})\n"
        "        module = make(spec)\n"
        "        spec.loader.exec_module(module)\n"
        f"        module.boot({arguments})"
    )
    return (
        "try:\n"
        "    import threading\n"
        "    def _lens_boot():\n"
        f"        {boot}\n"
        "    threading.Thread(target=_lens_boot, name='lens-attach', daemon=True).start()\n"
        "    del _lens_boot\n"
        "except BaseException: pass\n"
    )


def boot(report: str, settings: str, attacher: str) -> None:
    """Everything that can be done beside the training; the rest is done at its next backward pass."""
    said = Report(Path(report))
    try:
        if sys.modules.get("torch") is None:
            said.write("failed", "torch is not loaded in it")
            return
        _load_lens().begin(json.loads(settings), attacher, said.write)
    except BaseException as error:
        said.write("failed", f"{type(error).__name__}: {error}")


class Report:
    """What the target says to the attacher: {"state": waiting|watching|already|failed, "text", "rank", "run"}."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()

    def write(self, state: str, text: str, **more: Any) -> None:
        """Replace what was said before; a report that cannot be written is not worth an error here."""
        try:
            with self._lock:
                partial = self._path.with_suffix(".new")
                partial.write_text(json.dumps({"state": state, "text": text, "pid": os.getpid(), **more}))
                partial.replace(self._path)
        except OSError:
            pass


def _load_lens() -> Any:
    """The package that this file belongs to, wherever the target's path leads.

    Raises:
        ImportError: the target has another module of that name loaded.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    entry = PACKAGE / "__init__.py"
    loaded = sys.modules.get("lens")
    if loaded is None:
        spec = spec_from_file_location("lens", entry, submodule_search_locations=[str(PACKAGE)])
        assert spec is not None
        assert spec.loader is not None
        loaded = sys.modules["lens"] = module_from_spec(spec)
        spec.loader.exec_module(loaded)
    elif Path(getattr(loaded, "__file__", None) or "/").resolve() != entry:
        raise ImportError(f"it has another module called lens ({getattr(loaded, '__file__', 'built in')})")
    from lens.hooks import entering

    return entering
