"""InfiniBand ports read from a tree of files: the kernel's spelling, drivers that differ, what goes missing."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens import catalogue
from lens.collectors.infiniband import COUNTERS, InfinibandCollector, rate_of
from lens.collectors.protocol import Reading
from lens.collectors.simulated.fake_sysfs import NICS, NicPort, Tree, write_infiniband

PORT_FILES = {
    "state": "4: ACTIVE",
    "phys_state": "5: LinkUp",
    "rate": "400 Gb/sec (4X NDR)",
    "counters/port_xmit_data": "1000",
    "counters/port_rcv_data": "500",
    "counters/port_xmit_wait": "250",
    "counters/symbol_error": "3",
    "counters/link_downed": "1",
    "hw_counters/out_of_sequence": "7",
    "hw_counters/np_cnp_sent": "11",
}


def port(root: Path, device: str = "mlx5_0", number: int = 1, **files: str | None) -> Path:
    """A port with the usual files; keywords replace them, ``__`` stands for the slash, None takes one away."""
    folder = root / f"sys/class/infiniband/{device}/ports/{number}"
    content = {**PORT_FILES, **{name.replace("__", "/"): text for name, text in files.items()}}
    for name, text in content.items():
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text + "\n")
    return folder


def opened(root: Path, **options: Any) -> InfinibandCollector:
    collector = InfinibandCollector("host3", root, **options)
    assert collector.probe().available
    return collector


def values(
    readings: Iterable[Reading], device: str = "host3/mlx5_0", number: int = 1
) -> dict[tuple[str, ...], float]:
    """Values by metric and labels (without port and simulated) of one port."""
    return {
        (r.metric, *(v for k, v in sorted(r.labels.items()) if k not in ("port", "simulated", "hw.type"))): r.value
        for r in readings
        if r.device == device and r.labels["port"] == str(number)
    }


def refuse(patch: pytest.MonkeyPatch, numbers: dict[str, int]) -> None:
    """Let the driver refuse to read files of these names."""
    read = Path.read_text

    def read_text(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name in numbers:
            raise OSError(numbers[path.name], os.strerror(numbers[path.name]), str(path))
        return read(path, *arguments, **options)

    patch.setattr(Path, "read_text", read_text)


def test_a_port_gives_its_counters_in_si_units(tmp_path: Path) -> None:
    port(tmp_path)
    collector = opened(tmp_path)
    fast, slow = values(collector.read("fast")), values(collector.read("slow"))
    assert fast["hw.network.io", "transmit"] == 4000
    assert fast["hw.network.io", "receive"] == 2000
    assert fast["hw.network.up",] == 1
    assert slow["hw.network.bandwidth.limit",] == 50e9
    assert slow["hw.errors", "symbol"] == 3
    assert slow["net.ib.link_downed",] == 1
    assert slow["net.rdma.out_of_sequence",] == 7
    assert slow["net.roce.cnp_sent",] == 11


def test_every_metric_is_in_the_catalogue(tmp_path: Path) -> None:
    port(tmp_path)
    collector = opened(tmp_path, wait_tick_s=1.0)
    names = {reading.metric for _ in range(2) for reading in collector.read("fast")}
    names |= {reading.metric for reading in collector.read("slow")} | {row.metric for row in COUNTERS}
    assert "hw.network.bandwidth.utilization" in names
    assert not {name for name in names if not catalogue.is_known(name)}


def test_each_port_of_each_device_is_its_own(tmp_path: Path) -> None:
    port(tmp_path)
    port(tmp_path, number=2, counters__port_xmit_data="9")
    port(tmp_path, device="mlx5_1", counters__port_xmit_data="8")
    collector = opened(tmp_path)
    readings = collector.read("fast")
    assert values(readings)["hw.network.io", "transmit"] == 4000
    assert values(readings, number=2)["hw.network.io", "transmit"] == 36
    assert values(readings, "host3/mlx5_1")["hw.network.io", "transmit"] == 32
    assert [device.name for device in collector.devices()] == ["host3/mlx5_0", "host3/mlx5_1"]


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("400 Gb/sec (4X NDR)", 50e9),
        ("200 Gb/sec (4X HDR)", 25e9),
        ("2.5 Gb/sec (1X SDR)", 312.5e6),
        ("", None),
        ("N/A", None),
        ("unknown", None),
    ],
)
def test_the_rate_is_parsed_or_absent(text: str, rate: float | None) -> None:
    assert rate_of(text) == rate


BYTES = {
    "ionic with its own counters": (
        "ionic_0",
        {"hw_counters__tx_rdma_ucast_bytes": "777", "hw_counters__rx_rdma_ucast_bytes": "555"},
        (777, 555),
    ),
    "ionic without them": ("ionic_0", {}, (1000, 500)),
    "bnxt_re with its own counters": (
        "bnxt_re3",
        {"hw_counters__tx_bytes": "777", "hw_counters__rx_bytes": "555"},
        (777, 555),
    ),
    "bnxt_re without them": ("bnxt_re3", {}, (1000, 500)),
    "another driver with such a file": ("mlx5_0", {"hw_counters__tx_bytes": "777"}, (4000, 2000)),
}


@pytest.mark.parametrize(("device", "files", "expected"), BYTES.values(), ids=BYTES.keys())
def test_drivers_that_count_bytes_are_not_multiplied(
    device: str, files: dict[str, str], expected: tuple[int, int], tmp_path: Path
) -> None:
    port(tmp_path, device, **files)
    found = values(opened(tmp_path).read("fast"), f"host3/{device}")
    assert (found["hw.network.io", "transmit"], found["hw.network.io", "receive"]) == expected


def test_a_renamed_device_is_known_by_its_driver(tmp_path: Path) -> None:
    folder = port(tmp_path, "rocep65s0")
    driver = tmp_path / "sys/bus/pci/drivers/bnxt_en"
    driver.mkdir(parents=True)
    (folder.parent.parent / "device").mkdir()
    (folder.parent.parent / "device/driver").symlink_to(driver)
    found = values(opened(tmp_path).read("fast"), "host3/rocep65s0")
    assert found["hw.network.io", "transmit"] == 1000


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.ENODATA])
def test_a_counter_that_cannot_be_read_is_absent_and_costs_no_other(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port(tmp_path)
    refuse(monkeypatch, {"port_xmit_data": number, "symbol_error": number, "rate": number})
    collector = opened(tmp_path)
    found = {**values(collector.read("fast")), **values(collector.read("slow"))}
    assert ("hw.network.io", "transmit") not in found
    assert ("hw.errors", "symbol") not in found
    assert ("hw.network.bandwidth.limit",) not in found
    assert found["hw.network.io", "receive"] == 2000
    assert found["net.ib.link_downed",] == 1


@pytest.mark.parametrize("text", ["N/A", "N/A (no PMA)", "", "nonsense", None])
def test_a_counter_without_a_number_is_absent_and_not_zero(text: str | None, tmp_path: Path) -> None:
    port(tmp_path, counters__port_rcv_data=text, counters__symbol_error=text, hw_counters__np_cnp_sent=text)
    collector = opened(tmp_path)
    found = {**values(collector.read("fast")), **values(collector.read("slow"))}
    assert not {("hw.network.io", "receive"), ("hw.errors", "symbol"), ("net.roce.cnp_sent",)} & set(found)
    assert found["hw.network.io", "transmit"] == 4000


def test_a_state_that_is_not_known_is_not_down(tmp_path: Path) -> None:
    folder = port(tmp_path, phys_state=None)
    collector = opened(tmp_path)
    assert ("hw.network.up",) not in values(collector.read("fast"))
    (folder / "state").write_text("1: DOWN\n")
    assert values(collector.read("fast"))["hw.network.up",] == 0


def test_waiting_has_a_time_only_where_the_tick_is_known(tmp_path: Path) -> None:
    port(tmp_path)
    assert ("net.ib.xmit_wait.time",) not in values(opened(tmp_path).read("fast"))
    assert values(opened(tmp_path).read("fast"))["net.ib.xmit_wait.ticks",] == 250
    known = values(opened(tmp_path, wait_tick_s=0.5).read("fast"))
    assert known["net.ib.xmit_wait.time",] == 125


def test_utilisation_is_the_share_of_the_rate_and_a_reset_gives_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10**9]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    folder = port(tmp_path)
    collector = opened(tmp_path)
    key = ("hw.network.bandwidth.utilization", "transmit")
    assert key not in values(collector.read("fast"))
    now[0] += 2 * 10**9
    (folder / "counters/port_xmit_data").write_text(str(1000 + 25 * 10**9 // 4 * 2))
    assert values(collector.read("fast"))[key] == pytest.approx(0.5)
    now[0] += 10**9
    (folder / "counters/port_xmit_data").write_text("40")
    after = values(collector.read("fast"))
    assert key not in after
    assert after["hw.network.io", "transmit"] == 160
    now[0] += 10**9
    (folder / "counters/port_xmit_data").write_text(str(40 + 25 * 10**9 // 4))
    assert values(collector.read("fast"))[key] == pytest.approx(0.5)


def test_hardware_counters_are_not_read_before_they_can_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [10**9]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    port(tmp_path, hw_counters__lifespan="12000")
    collector = opened(tmp_path)
    assert ("net.roce.cnp_sent",) in values(collector.read("slow"))
    now[0] += 5 * 10**9
    found = values(collector.read("slow"))
    assert ("net.roce.cnp_sent",) not in found
    assert ("hw.errors", "symbol") in found
    now[0] += 8 * 10**9
    assert ("net.roce.cnp_sent",) in values(collector.read("slow"))


def test_a_link_that_goes_down_and_comes_back_is_two_events(tmp_path: Path) -> None:
    folder = port(tmp_path)
    collector = opened(tmp_path)
    collector.read("fast")
    (folder / "state").write_text("1: DOWN\n")
    collector.read("fast")
    collector.read("fast")
    (folder / "state").write_text("4: ACTIVE\n")
    collector.read("fast")
    events = collector.events(0.05)
    assert [(event.kind, event.severity) for event in events] == [
        ("net.link.down", "error"),
        ("net.link.up", "info"),
    ]
    assert {(event.device, event.attrs["port"]) for event in events} == {("host3/mlx5_0", "1")}
    assert collector.events(0.01) == []


def test_a_device_that_is_unplugged_gives_nothing(tmp_path: Path) -> None:
    folder = port(tmp_path)
    collector = opened(tmp_path)
    folder.parent.parent.rename(tmp_path / "gone")
    assert [*collector.read("fast"), *collector.read("slow")] == []


def test_where_there_is_no_device_the_probe_says_so(tmp_path: Path) -> None:
    probe = InfinibandCollector("host3", tmp_path).probe()
    assert not probe.available
    assert "/sys/class/infiniband" in probe.reason


@pytest.mark.parametrize("maker", NICS)
@given(sizes=st.lists(st.integers(0, 1 << 50), min_size=1, max_size=4))
def test_bytes_written_by_the_simulation_are_the_bytes_read(
    maker: str, sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    tree, simulated = Tree(root), NicPort(NICS[maker], 0)
    write_infiniband(tree, [simulated])
    collector = opened(root, simulated=True)
    total = 0
    for size in sizes:
        simulated.transmit += size * 4
        total += size * 4
        write_infiniband(tree, [simulated])
        readings = collector.read("fast")
        assert values(readings, f"host3/{simulated.name}")["hw.network.io", "transmit"] == total
        assert {reading.labels["simulated"] for reading in readings} == {"true"}
