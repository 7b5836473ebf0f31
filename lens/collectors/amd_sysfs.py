"""AMD cards through the files of the amdgpu driver, where no amdsmi can be used: less, but what there is is true.

Under ``/sys/class/drm/card<n>/device`` and its hwmon folder; which process holds what memory stands under
``/sys/class/kfd``. hwmon gives µW and m°C. Everything hangs under `root`, so that a test can bring its own tree.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.collectors.amd_sources import MICRO, Row, Values, scaled
from lens.collectors.protocol import CollectorEvent

_VENDOR = "0x1002"
_CARD = re.compile(r"card\d+")
_CURRENT_CLOCK = re.compile(r"(\d+)\s*MHz\s*\*", re.IGNORECASE)
_ANY_CLOCK = re.compile(r"(\d+)\s*MHz", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_NONE: Mapping[str, str] = {}
_GPU = {"hw.type": "gpu"}
_MILLI = 1e-3
_FAN_STEPS = 255
_SENSORS = {"junction": "core", "mem": "memory", "edge": "edge"}
_REFUSED = {errno.EACCES: "permission", errno.EPERM: "permission"}
_LATER = frozenset((errno.EBUSY, errno.EAGAIN, errno.EINTR))
_MODELS = {
    "0x7408": "AMD Instinct MI250X",
    "0x740c": "AMD Instinct MI250X",
    "0x740f": "AMD Instinct MI210",
    "0x74a0": "AMD Instinct MI300A",
    "0x74a1": "AMD Instinct MI300X",
    "0x74a5": "AMD Instinct MI325X",
    "0x75a0": "AMD Instinct MI350X",
    "0x75a3": "AMD Instinct MI355X",
}
"""Models by PCI device id, for boards that do not hold their product name."""


@dataclass
class SysfsCard:
    """The folder of one card."""

    folder: Path
    hwmon: Path | None
    pci: str
    partition: int = 0

    def begin(self) -> None:
        """A new tick; nothing is kept between two."""

    def text(self, name: str) -> str:
        """A file of the card.

        Raises:
            OSError: there is none, or the driver refuses.
        """
        return (self.folder / name).read_text().strip()

    def sensor(self, name: str) -> str:
        """A file of the card's hwmon folder.

        Raises:
            OSError: there is none, or the driver refuses.
        """
        if self.hwmon is None:
            raise FileNotFoundError(errno.ENOENT, "no hwmon folder", str(self.folder))
        return (self.hwmon / name).read_text().strip()


def leading_number(text: str) -> float | None:
    """The number a file begins with; None for "N/A", "Unknown" and the like."""
    found = _NUMBER.match(text)
    return float(found.group()) if found else None


def _file(metric: str, name: str, factor: float = 1.0, **labels: str) -> Callable[[SysfsCard], Values]:
    def read(card: SysfsCard) -> Values:
        return ((metric, scaled(leading_number(card.text(name)), factor), labels),)

    return read


def _memory(card: SysfsCard) -> Values:
    total, used = (leading_number(card.text(f"mem_info_vram_{kind}")) for kind in ("total", "used"))
    if not total:
        return
    yield "hw.gpu.memory.limit", total, _NONE
    yield "hw.gpu.memory.usage", used, _NONE
    yield "hw.gpu.memory.utilization", scaled(used, 1 / total), _NONE


def _clock(metric: str, name: str) -> Callable[[SysfsCard], Values]:
    """The level marked with a star; none is marked while the card sleeps."""

    def read(card: SysfsCard) -> Values:
        current = _CURRENT_CLOCK.search(card.text(name))
        return ((metric, float(current.group(1)) if current else None, _NONE),)

    return read


def _highest_clock(card: SysfsCard) -> Values:
    levels = [float(level) for level in _ANY_CLOCK.findall(card.text("pp_dpm_sclk"))]
    yield "gpu.clock.sm.max", max(levels, default=None), _NONE


def _power(card: SysfsCard) -> Values:
    """Power of this moment; older cards give a mean alone."""
    try:
        text = card.sensor("power1_input")
    except OSError:
        text = card.sensor("power1_average")
    yield "hw.power", scaled(leading_number(text) or None, MICRO), _GPU


def _power_limit(card: SysfsCard) -> Values:
    yield "gpu.power.limit", scaled(leading_number(card.sensor("power1_cap")) or None, MICRO), _NONE


def _temperatures(card: SysfsCard) -> Values:
    return [("hw.temperature", value, {"sensor": sensor}) for sensor, value in _sensors(card, "input")]


def _temperature_limit(card: SysfsCard) -> Values:
    limits = [value for sensor, value in _sensors(card, "crit") if sensor == "core"]
    return [("hw.temperature.limit", value, {"limit": "critical"}) for value in limits]


def _sensors(card: SysfsCard, kind: str) -> Iterator[tuple[str, float | None]]:
    """(sensor, value) of the temperature channels this card has; one that gives no value is left out."""
    labels = sorted(card.hwmon.glob("temp*_label")) if card.hwmon else []
    if not labels:
        raise FileNotFoundError(errno.ENOENT, "no temperature channel", str(card.folder))
    for label in labels:
        with contextlib.suppress(OSError):
            sensor = _SENSORS.get(label.read_text().strip())
            if sensor:
                text = card.sensor(label.name.replace("_label", f"_{kind}"))
                yield sensor, scaled(leading_number(text), _MILLI)


def _errors(card: SysfsCard) -> Values:
    """Memory errors, two lines: ``ue: 0`` and ``ce: 3``."""
    kinds = {"ce": "corrected", "ue": "uncorrected"}
    for line in card.text("ras/umc_err_count").splitlines():
        name, _, count = line.partition(":")
        if name in kinds:
            labels = {"error.type": kinds[name], "block": "memory"}
            yield "hw.errors", leading_number(count.strip()), labels


def _fan(card: SysfsCard) -> Values:
    yield "hw.fan.speed_ratio", scaled(leading_number(card.sensor("pwm1")), 1 / _FAN_STEPS), _NONE


SYSFS_ROWS = (
    Row("fast", ("hw.gpu.utilization",), _file("hw.gpu.utilization", "gpu_busy_percent", 0.01)),
    Row("fast", ("gpu.memory.activity",), _file("gpu.memory.activity", "mem_busy_percent", 0.01)),
    Row("fast", ("hw.gpu.memory.usage", "hw.gpu.memory.limit", "hw.gpu.memory.utilization"), _memory),
    Row("fast", ("hw.power",), _power, socket=True),
    Row("fast", ("gpu.power.limit",), _power_limit, socket=True),
    Row("fast", ("gpu.clock.sm",), _clock("gpu.clock.sm", "pp_dpm_sclk")),
    Row("fast", ("gpu.clock.memory",), _clock("gpu.clock.memory", "pp_dpm_mclk")),
    Row("fast", ("hw.temperature",), _temperatures, socket=True),
    Row("slow", ("gpu.clock.sm.max",), _highest_clock),
    Row("slow", ("hw.temperature.limit",), _temperature_limit, socket=True),
    Row("slow", ("gpu.memory.host_visible.usage",), _file("gpu.memory.host_visible.usage", "mem_info_gtt_used")),
    Row("slow", ("gpu.pcie.link.width",), _file("gpu.pcie.link.width", "current_link_width")),
    Row("slow", ("gpu.pcie.link.width.max",), _file("gpu.pcie.link.width.max", "max_link_width")),
    Row("slow", ("gpu.pcie.link.speed",), _file("gpu.pcie.link.speed", "current_link_speed")),
    Row("slow", ("gpu.pcie.link.speed.max",), _file("gpu.pcie.link.speed.max", "max_link_speed")),
    Row("slow", ("gpu.pcie.replays",), _file("gpu.pcie.replays", "pcie_replay_count")),
    Row("slow", ("hw.errors",), _errors, socket=True),
    Row("slow", ("hw.fan.speed_ratio",), _fan, socket=True),
)


class SysfsDoor:
    """AMD cards through the driver's files.

    Args:
        root: where /sys hangs.
    """

    rows: tuple[Row, ...] = SYSFS_ROWS

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kfd = root / "sys/class/kfd/kfd"

    def handles(self) -> list[SysfsCard]:
        """The cards there are, in the order of their numbers."""
        folders = [path for path in (self._root / "sys/class/drm").glob("card*") if _CARD.fullmatch(path.name)]
        found = [_open(path / "device") for path in sorted(folders, key=lambda path: int(path.name[4:]))]
        return [card for card in found if card is not None]

    def describe(self, card: SysfsCard) -> dict[str, Any]:
        """What is known once: uuid, model, pci, memory_bytes, driver; what is not known is absent."""
        unique, megabytes = _text(card.folder / "unique_id"), _text(card.folder / "mem_info_vram_total")
        found = {
            "uuid": f"GPU-{unique}" if unique else "",
            "model": _text(card.folder / "product_name") or _MODELS.get(_text(card.folder / "device")),
            "pci": card.pci,
            "memory_bytes": int(leading_number(megabytes) or 0),
            "driver": _text(self._root / "sys/module/amdgpu/version"),
        }
        return {name: value for name, value in found.items() if value}

    def judge(self, card: SysfsCard, error: Exception) -> tuple[str, str]:
        """What an error means: ("never", reason), ("later", ""), ("lost", code) or ("error", code)."""
        if not isinstance(error, OSError):
            return "error", type(error).__name__
        if error.errno in _LATER:
            return "later", ""
        if not self.alive(card):
            return "lost", str(error.errno)
        # EINVAL, EOPNOTSUPP and the like: amdgpu has the file on every card and the value on some.
        return "never", _REFUSED.get(error.errno or 0, "unsupported")

    def alive(self, card: SysfsCard) -> bool:
        """Whether the card is still on the bus."""
        return _text(card.folder / "vendor") == _VENDOR

    def processes(self, card: SysfsCard) -> Iterator[tuple[int, int | None]]:
        """(pid, bytes) of the compute processes on a card."""
        identity = self._kfd_id(card.pci)
        if identity is None:
            return
        for file in sorted((self._kfd / "proc").glob(f"*/vram_{identity}")):
            size = leading_number(_text(file))
            if size:
                yield int(file.parent.name), int(size)

    def events(self, cards: Mapping[str, SysfsCard], timeout_s: float) -> Sequence[CollectorEvent] | None:
        """None: the files give no notices."""
        return None

    def close(self) -> None:
        """Nothing is held open."""

    def _kfd_id(self, pci: str) -> str | None:
        """The number by which the compute driver knows the card of this PCI address."""
        for node in (self._kfd / "topology/nodes").glob("*"):
            lines = [line.split(maxsplit=1) for line in _text(node / "properties").splitlines()]
            properties = {line[0]: line[1] for line in lines if len(line) == 2}
            if _pci_of(properties) == pci:
                return _text(node / "gpu_id") or None
        return None


def _open(folder: Path) -> SysfsCard | None:
    """The card in a folder; None where it holds none of AMD's, or a mere connector of a processor."""
    if _text(folder / "vendor") != _VENDOR or not (folder / "mem_info_vram_total").exists():
        return None
    hwmon = next(iter(sorted(folder.glob("hwmon/hwmon*"))), None)
    lines = dict(line.split("=", 1) for line in _text(folder / "uevent").splitlines() if "=" in line)
    return SysfsCard(folder, hwmon, lines.get("PCI_SLOT_NAME", ""))


def _pci_of(properties: Mapping[str, str]) -> str | None:
    """PCI address of a compute node: ``location_id`` is bus, device and function in 16 bits."""
    place, domain = properties.get("location_id", ""), properties.get("domain", "0")
    if not (place.isdigit() and domain.isdigit()):
        return None
    bits = int(place)
    return f"{int(domain):04x}:{bits >> 8 & 0xFF:02x}:{bits >> 3 & 0x1F:02x}.{bits & 7}"


def _text(path: Path) -> str:
    """A file's text; empty where there is none to read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""
