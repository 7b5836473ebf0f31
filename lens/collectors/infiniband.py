"""InfiniBand and RoCE ports by the files under /sys/class/infiniband, one row a counter.

Facts the tables rest on: ``port_{xmit,rcv}_data`` count 32-bit words, but for ionic and bnxt_re, which count bytes
and keep the better counters under ``hw_counters``; a counter the device does not have is a file that cannot be read
(EINVAL, EOPNOTSUPP) or says "N/A"; hw_counters are fetched from the device once a ``lifespan`` at most, so there is
nothing new sooner; how long a tick of ``port_xmit_wait`` is, only the maker knows. Counters go as they are, and a
decrease is a reset. Everything hangs under `root`, so that a simulated fabric is a tree of files.
"""

from __future__ import annotations

import contextlib
import queue
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lens.collectors.protocol import CollectorEvent, DeviceInfo, Group, Probe, ProcessUse, Reading

_CLASS = "sys/class/infiniband"
_WORD = 4
_BYTES_A_GIGABIT = 1.25e8
_RATE = re.compile(r"([\d.]+)\s*Gb/sec")
_ACTIVE, _LINK_UP = 4, 5
_MILLI_NS = 1_000_000
_DIRECTIONS = ("transmit", "receive")
_VENDORS = {"0x15b3": "nvidia", "0x14e4": "broadcom", "0x1dd8": "amd", "0x8086": "intel"}

Value = tuple[str, float, dict[str, str]]


@dataclass(frozen=True)
class ByteFiles:
    """Where a driver counts bytes."""

    driver: str
    """How names of its devices, or of the driver itself, begin."""
    transmit: str
    receive: str
    factor: int = 1


_PLAIN = ByteFiles("", "counters/port_xmit_data", "counters/port_rcv_data", _WORD)
BYTE_FILES = (
    ByteFiles("ionic", "hw_counters/tx_rdma_ucast_bytes", "hw_counters/rx_rdma_ucast_bytes"),
    ByteFiles("bnxt_re", "hw_counters/tx_bytes", "hw_counters/rx_bytes"),
    ByteFiles("ionic", _PLAIN.transmit, _PLAIN.receive),
    ByteFiles("bnxt_re", _PLAIN.transmit, _PLAIN.receive),
    _PLAIN,
)
"""The first row that fits driver and files is the one read."""
_RDMA_DRIVERS = {"bnxt_en": "bnxt_re"}
"""RDMA driver by the driver of the network card beneath."""


@dataclass(frozen=True)
class Counter:
    """One file and the metric it is."""

    group: str
    file: str
    metric: str
    labels: Mapping[str, str] = field(default_factory=dict)


def _towards(direction: str) -> dict[str, str]:
    return {"network.io.direction": direction}


def _error(kind: str) -> dict[str, str]:
    return {"hw.type": "network", "error.type": kind}


COUNTERS = (
    Counter("fast", "counters/port_xmit_packets", "hw.network.packets", _towards("transmit")),
    Counter("fast", "counters/port_rcv_packets", "hw.network.packets", _towards("receive")),
    Counter("slow", "counters/port_xmit_discards", "net.ib.xmit_discards"),
    Counter("slow", "counters/link_downed", "net.ib.link_downed"),
    Counter("slow", "counters/symbol_error", "hw.errors", _error("symbol")),
    Counter("slow", "counters/link_error_recovery", "hw.errors", _error("link_recovery")),
    Counter("slow", "counters/port_rcv_errors", "hw.errors", _error("receive")),
    Counter("slow", "counters/local_link_integrity_errors", "hw.errors", _error("link_integrity")),
    Counter("slow", "counters/excessive_buffer_overrun_errors", "hw.errors", _error("buffer_overrun")),
    Counter("slow", "counters/VL15_dropped", "hw.errors", _error("management_dropped")),
    Counter("slow", "hw_counters/np_cnp_sent", "net.roce.cnp_sent"),
    Counter("slow", "hw_counters/tx_rdma_cnp_pkts", "net.roce.cnp_sent"),
    Counter("slow", "hw_counters/rp_cnp_handled", "net.roce.cnp_handled"),
    Counter("slow", "hw_counters/rx_rdma_cnp_pkts", "net.roce.cnp_handled"),
    Counter("slow", "hw_counters/np_ecn_marked_roce_packets", "net.roce.ecn_marked"),
    Counter("slow", "hw_counters/rx_rdma_ecn_pkts", "net.roce.ecn_marked"),
    Counter("slow", "hw_counters/out_of_sequence", "net.rdma.out_of_sequence"),
    Counter("slow", "hw_counters/req_rx_pkt_seq_err", "net.rdma.out_of_sequence"),
    Counter("slow", "hw_counters/out_of_buffer", "net.rdma.out_of_buffer"),
    Counter("slow", "hw_counters/packet_seq_err", "net.rdma.retransmits", {"kind": "sequence"}),
    Counter("slow", "hw_counters/local_ack_timeout_err", "net.rdma.retransmits", {"kind": "timeout"}),
    Counter("slow", "hw_counters/rnr_nak_retry_err", "net.rdma.retransmits", {"kind": "receiver_not_ready"}),
    Counter("slow", "hw_counters/roce_adp_retrans", "net.rdma.retransmits", {"kind": "adaptive"}),
    Counter("slow", "hw_counters/duplicate_request", "net.rdma.retransmits", {"kind": "duplicate"}),
    Counter("slow", "hw_counters/tx_rdma_retx_pkts", "net.rdma.retransmits", {"kind": "sent_again"}),
)


@dataclass
class _Port:
    folder: Path
    device: str
    """How records call it, such as ``host3/mlx5_0``."""
    labels: Mapping[str, str]
    files: ByteFiles
    bytes_before: dict[str, tuple[float, int]] = field(default_factory=dict)
    """(bytes, time) by direction."""
    up: bool | None = None
    hardware_due_ns: int = 0

    def read(self, name: str) -> str | None:
        """A file's text; None where the device does not give it."""
        try:
            return (self.folder / name).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None

    def count(self, name: str) -> float | None:
        """A counter; None where there is none or it says "N/A"."""
        text = self.read(name)
        return float(text) if text and text.isdigit() else None


class InfinibandCollector:
    """Readings of every port of this host's RDMA devices.

    Args:
        host: the host's name; device mlx5_0 is called ``host/mlx5_0``.
        root: where /sys hangs.
        simulated: whether the tree is a simulation; then every reading says so.
        wait_tick_s: length of a tick of ``port_xmit_wait``, where it is known; without it no time is given.
    """

    backend = "infiniband"

    def __init__(
        self, host: str, root: Path = Path("/"), simulated: bool = False, wait_tick_s: float | None = None
    ) -> None:
        self._host = host
        self._class = root / _CLASS
        self._simulated = simulated
        self._wait_tick_s = wait_tick_s
        self._ports: list[_Port] = []
        self._events: queue.SimpleQueue[CollectorEvent] = queue.SimpleQueue()

    def probe(self) -> Probe:
        """Find the ports. Never raises."""
        with contextlib.suppress(OSError):
            self._ports = [
                self._open(folder) for folder in sorted(self._class.glob("*/ports/*")) if folder.name.isdigit()
            ]
        if self._ports:
            return Probe(True)
        return Probe(False, "no RDMA device under /sys/class/infiniband")

    def devices(self) -> Sequence[DeviceInfo]:
        """The network devices found."""
        folders = dict.fromkeys(port.folder.parent.parent for port in self._ports)
        return [self._describe(folder, index) for index, folder in enumerate(folders)]

    def groups(self) -> Sequence[Group]:
        """Fast for traffic and state, slow for errors, congestion and speed."""
        return [Group("fast", 1.0), Group("slow", 5.0)]

    def read(self, group: str) -> Sequence[Reading]:
        """One reading of every port; what a port does not give is left out."""
        readings: list[Reading] = []
        for port in self._ports:
            t_ns = time.monotonic_ns()
            values = [*self._counters(port, group, t_ns)]
            values += [*self._traffic(port, t_ns), *self._state(port, t_ns)] if group == "fast" else _speed(port)
            for metric, value, labels in values:
                readings.append(Reading(metric, value, t_ns, {**labels, **port.labels}, device=port.device))
        return readings

    def events(self, timeout_s: float) -> Sequence[CollectorEvent]:
        """Links that went down or came back, as seen by `read`; waits for the first, in a thread of its own."""
        found: list[CollectorEvent] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=timeout_s))
            while True:
                found.append(self._events.get_nowait())
        return found

    def processes(self) -> Sequence[ProcessUse]:
        """None: the files do not say who uses a port."""
        return []

    def close(self) -> None:
        """Nothing is held open."""

    def _open(self, folder: Path) -> _Port:
        device = folder.parent.parent
        labels = {"port": folder.name, **({"simulated": "true"} if self._simulated else {})}
        return _Port(folder, f"{self._host}/{device.name}", labels, _byte_files(device, folder))

    def _describe(self, folder: Path, index: int) -> DeviceInfo:
        speeds = (rate_of(_text(port / "rate")) for port in sorted(folder.glob("ports/*")))
        speed = next((speed for speed in speeds if speed is not None), None)
        return DeviceInfo(
            uuid=_text(folder / "node_guid"),
            index=index,
            name=f"{self._host}/{folder.name}",
            vendor=_VENDORS.get(_text(folder / "device/vendor"), "unknown"),
            model=_text(folder / "hca_type") or folder.name,
            peaks={"network": speed} if speed is not None else {},
            driver=_text(folder / "fw_ver"),
            simulated=self._simulated,
        )

    def _counters(self, port: _Port, group: str, t_ns: int) -> Iterable[Value]:
        fresh = self._hardware_is_fresh(port, t_ns) if group == "slow" else True
        for row in COUNTERS:
            if row.group == group and (fresh or not row.file.startswith("hw_counters/")):
                count = port.count(row.file)
                if count is not None:
                    yield row.metric, count, dict(row.labels)

    def _hardware_is_fresh(self, port: _Port, t_ns: int) -> bool:
        """Whether hw_counters can have changed since they were read; `lifespan` is in ms."""
        if t_ns < port.hardware_due_ns:
            return False
        lifespan = port.count("hw_counters/lifespan")
        port.hardware_due_ns = t_ns + int((lifespan or 0) * _MILLI_NS)
        return True

    def _traffic(self, port: _Port, t_ns: int) -> Iterable[Value]:
        limit = rate_of(port.read("rate") or "")
        for direction in _DIRECTIONS:
            count = port.count(getattr(port.files, direction))
            if count is None:
                continue
            size, labels = count * port.files.factor, _towards(direction)
            yield "hw.network.io", size, labels
            before = port.bytes_before.get(direction)
            port.bytes_before[direction] = (size, t_ns)
            # After a reset nobody knows how much went over the port since the look before.
            if before is not None and limit and size >= before[0] and t_ns > before[1]:
                share = (size - before[0]) / ((t_ns - before[1]) * 1e-9 * limit)
                yield "hw.network.bandwidth.utilization", min(1.0, share), labels
        ticks = port.count("counters/port_xmit_wait")
        if ticks is not None:
            yield "net.ib.xmit_wait.ticks", ticks, {}
            if self._wait_tick_s is not None:
                yield "net.ib.xmit_wait.time", ticks * self._wait_tick_s, {}

    def _state(self, port: _Port, t_ns: int) -> Iterable[Value]:
        state, physical = _state_of(port.read("state")), _state_of(port.read("phys_state"))
        if state is None or (state == _ACTIVE and physical is None):
            return
        up = state == _ACTIVE and physical == _LINK_UP
        if port.up is not None and up != port.up:
            self._report(port, up, t_ns)
        port.up = up
        yield "hw.network.up", float(up), {}

    def _report(self, port: _Port, up: bool, t_ns: int) -> None:
        number = port.labels["port"]
        what = "is up again" if up else "is down"
        kind, severity = ("net.link.up", "info") if up else ("net.link.down", "error")
        text = f"port {number} of {port.device} {what}"
        self._events.put(CollectorEvent(kind, severity, text, t_ns, port.device, {"port": number}))


def rate_of(text: str) -> float | None:
    """By/s in one direction of a port's ``rate``, such as ``400 Gb/sec (4X NDR)``; None where it says none."""
    found = _RATE.match(text)
    return float(found.group(1)) * _BYTES_A_GIGABIT if found else None


def _speed(port: _Port) -> Iterable[Value]:
    limit = rate_of(port.read("rate") or "")
    return [] if limit is None else [("hw.network.bandwidth.limit", limit, {})]


def _byte_files(device: Path, port: Path) -> ByteFiles:
    """Where this port counts bytes: by the device's name, or by its driver where udev has renamed it."""
    names = [device.name]
    with contextlib.suppress(OSError):
        driver = (device / "device/driver").resolve(strict=True).name
        names.append(_RDMA_DRIVERS.get(driver, driver))
    for row in BYTE_FILES:
        if any(name.startswith(row.driver) for name in names) and (port / row.transmit).exists():
            return row
    return _PLAIN


def _state_of(text: str | None) -> int | None:
    """The number of ``4: ACTIVE``."""
    head = (text or "").partition(":")[0]
    return int(head) if head.isdigit() else None


def _text(path: Path) -> str:
    """A file's text; empty where there is none to read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    return ""
