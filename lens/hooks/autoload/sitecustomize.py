"""What every Python process below ``lens run`` reads first: wait for torch, then for its first optimizer.

A process that makes no optimizer (a launcher, a data loader's worker, a compiler) is never watched, and pays one
dictionary look-up an import. Nothing here stands in the way of an import: no loader is wrapped, nothing is imported
early, and `sys.path` looks as if lens were not there. The user's own `sitecustomize` runs as it would have.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would cost every process
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib would cost every process its import
_TORCH_OPTIMIZERS = "torch.optim.optimizer"


class _WaitForTorch:
    """A finder that finds nothing: it looks whether torch's optimizers have been loaded since the last import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        loaded = sys.modules.get(_TORCH_OPTIMIZERS)
        if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
            sys.meta_path.remove(self)
            try:
                _wait_for_optimizer(loaded.Optimizer)
            except Exception as error:
                _warn(error)


def _wait_for_optimizer(optimizers: Any) -> None:
    """Begin to record when the first optimizer is made."""
    original = optimizers.__init__
    waiting = True

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        nonlocal waiting
        try:
            original(self, *args, **kwargs)
        except BaseException as error:
            # The user's traceback has no line of ours.
            error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
            raise
        if waiting:
            waiting = False
            if optimizers.__init__ is __init__:
                optimizers.__init__ = original
            try:
                _begin()
            except Exception as error:
                _warn(error)

    __init__.__wrapped__ = original  # type: ignore[attr-defined]
    __init__.__doc__ = original.__doc__
    optimizers.__init__ = __init__


def _begin() -> None:
    """Load lens, from where this file lies: neither its place on `sys.path` nor a namesake of it matters."""
    from importlib.util import find_spec, module_from_spec, spec_from_file_location

    package = os.path.dirname(os.path.dirname(_HERE))  # noqa: PTH120
    entry = os.path.join(package, "__init__.py")  # noqa: PTH118
    found = find_spec("lens")
    if found is not None and not (found.origin and os.path.realpath(found.origin) == os.path.realpath(entry)):
        raise ImportError("this program has another module called lens")
    if "lens" not in sys.modules:
        spec = spec_from_file_location("lens", entry, submodule_search_locations=[package])
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["lens"] = module_from_spec(spec)
        spec.loader.exec_module(module)
    from lens.hooks import api

    api.watch_unprepared()


def _warn(error: Exception) -> None:
    if sys.stderr is not None:
        print(f"lens: nothing is recorded, training goes on ({error})", file=sys.stderr)


sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]  # noqa: PTH100
if os.environ.get("LENS_AUTOLOAD") == "1" and sys.version_info >= (3, 10):
    sys.meta_path.insert(0, _WaitForTorch())
# The user's own, or the ImportError that Python expects where there is none.
del sys.modules["sitecustomize"]
__import__("sitecustomize")
