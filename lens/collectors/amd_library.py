"""Opening amdsmi, which is easier said than done, and what its errors mean.

The package index has an amdsmi without its library: importing that prints to stdout and raises KeyError. A copy of
another ROCm than the driver's misses a symbol and raises AttributeError. So every copy there is gets its try, with
ROCm's own first and the output swallowed, and whatever goes wrong is a reason and never an exception.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lens.collectors.amd_sources import SMI_ROWS, Row, SmiCard, first, number
from lens.collectors.protocol import CollectorEvent

_PACKAGE = "amdsmi"
_ROCM = "opt/rocm"
_PYTHON_PART = "share/amd_smi"
_NO_DATA = 40
_UNSUPPORTED = {
    1: "unsupported",
    2: "unsupported",
    3: "unsupported",
    5: "missing_symbol",
    10: "permission",
    20: "unsupported",
    52: "unsupported",
    55: "unsupported",
}
_LATER = frozenset((_NO_DATA, 8, 9, 11, 30))
"""No data yet, timeout, retry, interrupted, busy: asked again next time."""
_GONE = frozenset((12, 31, 32, 34, 54))
"""I/O error, not found, not initialised, driver not loaded, driver restart failed: perhaps the card is lost."""
_EVENTS = {
    "GPU_PRE_RESET": ("gpu.reset", "error", "is being reset"),
    "GPU_POST_RESET": ("gpu.reset", "warning", "was reset"),
    "RING_HANG": ("gpu.hang", "error", "hangs in a queue"),
    "VMFAULT": ("gpu.fault", "error", "touched memory that is not mapped"),
    "THERMAL_THROTTLE": ("gpu.throttle", "warning", "lowers its clocks for heat"),
}


class LibraryAbsentError(Exception):
    """No amdsmi can be used here; the message says why."""


class SmiDoor:
    """AMD cards through an opened amdsmi.

    Args:
        smi: the module, initialised.
    """

    rows: tuple[Row, ...] = SMI_ROWS

    def __init__(self, smi: Any) -> None:
        self._smi = smi
        self._readers: list[Any] | None = None

    def handles(self) -> list[SmiCard]:
        """The processors there are.

        Raises:
            LibraryAbsentError: the library cannot say.
        """
        try:
            return [SmiCard(self._smi, handle) for handle in self._smi.amdsmi_get_processor_handles()]
        except Exception as error:
            raise LibraryAbsentError(f"amdsmi does not say how many cards there are ({_reason(error)})") from error

    def describe(self, card: SmiCard) -> dict[str, Any]:
        """What is known once: uuid, model, pci, memory_bytes, driver, partition; what is not known is absent."""
        asic, board = (
            self._mapping(card, "amdsmi_get_gpu_asic_info"),
            self._mapping(card, "amdsmi_get_gpu_board_info"),
        )
        names = self._mapping(card, "amdsmi_get_gpu_enumeration_info")
        megabytes = number(self._mapping(card, "amdsmi_get_gpu_vram_usage").get("vram_total"))
        partition = first(self._mapping(card, "amdsmi_get_gpu_kfd_info"), "current_partition_id")
        card.partition = int(partition or 0)
        found = {
            "uuid": _text(names.get("hip_uuid")) or _text(self._ask(card, "amdsmi_get_gpu_device_uuid")),
            "model": _text(asic.get("market_name")) or _text(board.get("product_name")),
            "pci": _text(self._ask(card, "amdsmi_get_gpu_device_bdf")),
            "memory_bytes": int(megabytes) << 20 if megabytes else None,
            "driver": _text(self._mapping(card, "amdsmi_get_gpu_driver_info").get("driver_version")),
        }
        return {name: value for name, value in found.items() if value}

    def judge(self, card: SmiCard, error: Exception) -> tuple[str, str]:
        """What an error means: ("never", reason), ("later", ""), ("lost", code) or ("error", code)."""
        if isinstance(error, AttributeError | KeyError):
            return "never", "missing_symbol"
        code = error_code(error)
        if code is None:
            parameter = getattr(self._smi, "AmdSmiParameterException", ())
            return ("never", "unsupported") if isinstance(error, parameter) else ("error", type(error).__name__)
        if code in _UNSUPPORTED:
            return "never", _UNSUPPORTED[code]
        if code in _LATER:
            return "later", ""
        if code in _GONE:
            return ("error", str(code)) if self.alive(card) else ("lost", str(code))
        return "error", str(code)

    def alive(self, card: SmiCard) -> bool:
        """Whether the card still answers the simplest question."""
        try:
            card.call("amdsmi_get_gpu_vram_usage")
        except Exception as error:
            return error_code(error) not in _GONE
        return True

    def processes(self, card: SmiCard) -> Iterator[tuple[int, int | None]]:
        """(pid, bytes) of the processes on a card."""
        for process in self._ask(card, "amdsmi_get_gpu_process_list") or []:
            pid, use = number(process.get("pid")), process.get("memory_usage") or {}
            if pid is not None:
                size = number(use.get("vram_mem"))
                yield int(pid), None if size is None else int(size)

    def events(self, cards: Mapping[str, SmiCard], timeout_s: float) -> Sequence[CollectorEvent] | None:
        """Notices of the driver within this time; None where it gives none."""
        if self._readers is None:
            self._readers = list(self._open_readers(cards.values()))
        if not self._readers:
            return None
        try:
            # One reader hears the notices of every card that has one.
            notices = self._readers[0].read(int(timeout_s * 1000))
        except Exception as error:
            if error_code(error) not in _LATER:
                self._readers = []
            return []
        t_ns = time.monotonic_ns()
        return [event for event in (_event(notice, cards, t_ns) for notice in notices) if event]

    def close(self) -> None:
        """Let go of the library."""
        for reader in self._readers or []:
            with contextlib.suppress(Exception):
                reader.stop()
        with contextlib.suppress(Exception):
            self._smi.amdsmi_shut_down()

    def _ask(self, card: SmiCard, function: str) -> Any:
        """An answer that may be absent for any reason."""
        with contextlib.suppress(Exception):
            return card.call(function)
        return None

    def _mapping(self, card: SmiCard, function: str) -> Mapping[str, Any]:
        answer = self._ask(card, function)
        return answer if isinstance(answer, Mapping) else {}

    def _open_readers(self, cards: Any) -> Iterator[Any]:
        types = getattr(self._smi, "AmdSmiEvtNotificationType", None)
        wanted = [kind for kind in (getattr(types, name, None) for name in _EVENTS) if kind is not None]
        for card in cards:
            if card.partition == 0 and wanted:
                with contextlib.suppress(Exception):
                    yield self._smi.AmdSmiEventReader(card.handle, wanted)


def open_library(root: Path) -> SmiDoor:
    """The first amdsmi that loads and finds a driver; prints nothing.

    Raises:
        LibraryAbsentError: there is none, with the reason of the best candidate.
    """
    reasons = []
    for folder in _folders(root):
        smi, reason = _load(folder)
        if smi is not None:
            try:
                smi.amdsmi_init()
            except Exception as error:
                reason = f"amdsmi finds no driver ({_reason(error)})"
            else:
                return SmiDoor(smi)
        reasons.append(reason)
    raise LibraryAbsentError(reasons[0])


def error_code(error: Exception) -> int | None:
    """The status of the library that an exception carries, or None when it carries none."""
    code = getattr(error, "err_code", None)
    return int(code) if isinstance(code, int) else None


def _folders(root: Path) -> list[Path | None]:
    """Where amdsmi may be: what is loaded already or installed is None."""
    if _PACKAGE in sys.modules:
        return [None]
    named = [os.environ[name] for name in ("ROCM_PATH", "ROCM_HOME") if os.environ.get(name)]
    candidates = [Path(place) for place in named] + [root / _ROCM]
    found = [place / _PYTHON_PART for place in candidates if (place / _PYTHON_PART / _PACKAGE).is_dir()]
    return [*dict.fromkeys(found), None]


def _load(folder: Path | None) -> tuple[Any, str]:
    """The module, or None and why not; nothing half loaded stays behind."""
    path = list(sys.path)
    if folder is not None:
        sys.path.insert(0, str(folder))
    swallowed = io.StringIO()
    try:
        with contextlib.redirect_stdout(swallowed), contextlib.redirect_stderr(swallowed):
            return importlib.import_module(_PACKAGE), ""
    except ModuleNotFoundError:
        reason = "the package amdsmi is not installed"
    except Exception as error:
        reason = f"amdsmi cannot be loaded ({_reason(error)})"
    finally:
        sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]
    return None, reason


def _event(notice: Mapping[str, Any], cards: Mapping[str, SmiCard], t_ns: int) -> CollectorEvent | None:
    meaning = _EVENTS.get(str(notice.get("event")))
    if meaning is None:
        return None
    kind, severity, what = meaning
    wanted = _identity(notice.get("processor_handle"))
    device = next((name for name, card in cards.items() if _identity(card.handle) == wanted), None)
    attrs = {"event": notice["event"], "message": notice.get("message", "")}
    return CollectorEvent(kind, severity, f"{device or 'a card'} {what}", t_ns, device, attrs)


def _identity(handle: Any) -> Any:
    """What makes two handles the same: the address they hold."""
    return getattr(handle, "value", handle)


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) and value.strip() not in ("", "N/A") else ""


def _reason(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
