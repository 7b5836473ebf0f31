"""The AMD collector over a stand-in for amdsmi, over no amdsmi at all, and over the driver's files alone."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lens import catalogue
from lens.collectors.amd import AmdCollector
from lens.collectors.amd_sources import SMI_ROWS, Residency, number
from lens.collectors.amd_sysfs import SYSFS_ROWS
from lens.collectors.protocol import Reading
from lens.collectors.simulated import fake_amdsmi
from lens.collectors.simulated.device import Faults, SimDevice
from lens.collectors.simulated.fake_amdsmi import ABSENT, NO_PERMISSION, NOT_SUPPORTED, FakeAmdSmi
from lens.collectors.simulated.fake_sysfs import Tree, write_amdgpu
from lens.collectors.simulated.profiles import load_profiles

SECOND = 10**9
UNKNOWN_STATUS = 7
MIB = 1 << 20


def made_cards(name: str = "MI300X", count: int = 2) -> list[SimDevice]:
    cards = [SimDevice(load_profiles()[name], f"GPU-{index:016x}", index) for index in range(count)]
    for card in cards:
        card.advance(0)
        card.work("compute", 0.6, flops=1e10)
        card.work("comm", 0.2)
        card.transfer("nvlink", 7 << 20, 7 << 19)
        card.use_memory([(4242 + card.index, 1 << 20)])
        card.advance(SECOND)
    return cards


@pytest.fixture
def without_amdsmi(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No amdsmi loaded, and none of this machine's ROCm."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "amdsmi"}
    for name in ("ROCM_PATH", "ROCM_HOME"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "amdsmi"]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def library(without_amdsmi: None) -> FakeAmdSmi:
    return fake_amdsmi.install(made_cards())


def opened(**options: Any) -> AmdCollector:
    collector = AmdCollector("host3", simulated=True, **options)
    assert collector.probe().available
    return collector


def of_card(readings: Iterable[Reading], index: int = 0) -> dict[tuple[str, ...], float]:
    """Values by metric and labels (without simulated) of one card."""
    return {
        (r.metric, *(v for k, v in sorted(r.labels.items()) if k != "simulated")): r.value
        for r in readings
        if r.device == f"host3/gpu{index}"
    }


def metrics_of(readings: Iterable[Reading], index: int = 0) -> set[str]:
    return {key[0] for key in of_card(readings, index)}


def reasons(collector: AmdCollector, index: int = 0) -> dict[str, str]:
    """Why a metric is not given, by metric."""
    return {
        r.labels["metric"]: r.labels["reason"]
        for r in collector.read("slow")
        if r.metric == "lens.collector.supported" and r.device == f"host3/gpu{index}"
    }


def test_units_are_converted_where_the_value_is_read(library: FakeAmdSmi) -> None:
    card = library.cards[0]
    collector = opened()
    found, slow = of_card(collector.read("fast")), of_card(collector.read("slow"))
    assert found["hw.gpu.utilization",] == pytest.approx(0.8, abs=0.01)
    assert found["hw.power", "gpu"] == pytest.approx(card.power_w, abs=0.5)
    assert found["hw.energy", "gpu"] == pytest.approx(card.totals.energy_j, abs=1e-4)
    assert found["hw.gpu.memory.limit",] == card.profile.memory_bytes
    assert found["hw.gpu.memory.usage",] == card.memory_used // MIB * MIB
    assert found["gpu.power.limit",] == 750
    assert found["hw.gpu.io", "xgmi", "transmit"] == 7 << 20
    assert found["hw.gpu.io", "xgmi", "receive"] == 7 << 19
    assert found["hw.temperature", "core"] == round(card.celsius)
    assert slow["gpu.link.speed", "xgmi"] == 64e9
    assert slow["gpu.pcie.link.speed",] == 32.0
    assert slow["gpu.pcie.link.width",] == 16
    assert slow["hw.temperature.limit", "critical"] == 100


def test_energy_without_a_resolution_is_counted_in_the_usual_ticks(library: FakeAmdSmi) -> None:
    library.failures.absent.add((0, "counter_resolution"))
    energy = of_card(opened().read("fast"))["hw.energy", "gpu"]
    assert energy == pytest.approx(library.cards[0].totals.energy_j, abs=1e-4)


def test_every_metric_asked_for_is_in_the_catalogue() -> None:
    names = {metric for row in (*SMI_ROWS, *SYSFS_ROWS) for metric in row.metrics}
    assert not {name for name in names if not catalogue.is_known(name)}


def test_every_reading_says_that_it_is_simulated(library: FakeAmdSmi) -> None:
    collector = opened()
    readings = [*collector.read("fast"), *collector.read("slow")]
    assert {reading.labels.get("simulated") for reading in readings} == {"true"}
    assert all(device.simulated for device in collector.devices())


def test_a_card_is_described_once(library: FakeAmdSmi) -> None:
    info = opened().devices()[1]
    assert (info.name, info.vendor, info.model) == ("host3/gpu1", "amd", "AMD Instinct MI300X")
    assert (info.uuid, info.pci) == ("GPU-0000000000000001", "0000:02:00.0")
    assert info.peaks["bf16"] == 1307e12
    assert info.memory_bytes == 192 << 30


def test_what_is_not_available_is_absent_and_never_zero(library: FakeAmdSmi) -> None:
    library.failures.absent |= {(0, "gfx_activity"), (0, "current_socket_power"), (0, "current_gfxclks")}
    collector = opened()
    found = [collector.read("fast") for _ in range(3)][-1]
    assert not {"hw.gpu.utilization", "hw.power"} & metrics_of(found)
    # The card's one clock stands in for the clocks of its dies.
    assert {"gpu.clock.sm", "gpu.memory.activity"} <= metrics_of(found)
    assert {"hw.gpu.utilization", "hw.power"} <= metrics_of(found, 1)
    assert reasons(collector)["hw.power"] == "no_value"
    assert "hw.power" not in reasons(collector, 1)


@pytest.mark.parametrize("value", [ABSENT, None, True, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, -1, float("nan")])
def test_each_way_to_say_nothing_is_no_number(value: object) -> None:
    assert number(value) is None


@pytest.mark.parametrize(
    ("status", "reason"), [(NOT_SUPPORTED, "unsupported"), (NO_PERMISSION, "permission"), (5, "missing_symbol")]
)
def test_a_refused_metric_is_asked_once_and_named_with_the_reason(
    library: FakeAmdSmi, status: int, reason: str
) -> None:
    library.failures.functions[0, "amdsmi_get_energy_count"] = status
    collector = opened()
    for _ in range(3):
        assert "hw.energy" not in metrics_of(collector.read("fast"))
    assert library.calls.count((0, "amdsmi_get_energy_count")) == 1
    assert library.calls.count((1, "amdsmi_get_energy_count")) == 3
    assert reasons(collector)["hw.energy"] == reason


def test_a_library_whose_metrics_table_is_missing_still_gives_the_clock(library: FakeAmdSmi) -> None:
    library.failures.missing.add("amdsmi_get_gpu_metrics_info")
    assert of_card(opened().read("fast"))["gpu.clock.sm",] == library.cards[0].clock_mhz


def test_a_symbol_that_the_library_lacks_costs_its_metrics_alone(library: FakeAmdSmi) -> None:
    library.failures.missing |= {"amdsmi_get_gpu_metrics_info", "amdsmi_get_pcie_info"}
    collector = opened()
    found = metrics_of(collector.read("fast"))
    assert {"hw.gpu.utilization", "hw.power", "hw.energy"} <= found
    assert "hw.gpu.io" not in found
    assert reasons(collector)["hw.gpu.io"] == "missing_symbol"
    assert reasons(collector)["gpu.pcie.link.width"] == "missing_symbol"


def test_an_error_that_may_pass_is_counted_and_tried_again(library: FakeAmdSmi) -> None:
    library.failures.functions[0, "amdsmi_get_power_info"] = UNKNOWN_STATUS
    collector = opened()
    for _ in range(2):
        assert "hw.power" not in metrics_of(collector.read("fast"))
    errors = [r for r in collector.read("slow") if r.metric == "lens.collector.errors"]
    assert [(r.labels["metric"], r.labels["code"], r.value) for r in errors] == [("hw.power", "7", 2)]
    library.failures.functions.clear()
    assert "hw.power" in metrics_of(collector.read("fast"))


def test_a_lost_card_marks_only_itself_failed_and_may_come_back(library: FakeAmdSmi) -> None:
    collector = opened()
    library.cards[0].faults = Faults(lost=True)
    readings = collector.read("fast")
    assert of_card(readings)["hw.status", "failed"] == 1
    assert metrics_of(readings) == {"hw.status"}
    assert "hw.power" in metrics_of(readings, 1)
    events = collector.events(1.0)
    assert [(event.kind, event.device) for event in events] == [("gpu.lost", "host3/gpu0")]
    library.cards[0].faults = Faults()
    assert of_card(collector.read("slow"))["hw.status", "ok"] == 1
    assert "hw.power" in metrics_of(collector.read("fast"))


def test_throttle_reasons_have_the_other_maker_s_bits(library: FakeAmdSmi) -> None:
    bits = {"hot": (Faults(hot=True), 0x40), "cap": (Faults(power_cap_w=300), 0x4)}
    bits["brake"] = (Faults(power_brake=True), 0x80)
    for faults, bit in bits.values():
        library.cards = made_cards(count=1)
        collector, card = opened(), library.cards[0]
        assert "gpu.throttle.reasons" not in metrics_of(collector.read("fast"))
        card.faults = faults
        for second in (2, 3):
            card.work("compute", 0.9)
            card.advance(second * SECOND)
            found = of_card(collector.read("fast"))
        assert int(found["gpu.throttle.reasons",]) & bit
        assert not int(found["gpu.throttle.reasons",]) & ~bit & (0x4 | 0x80)


def test_residency_becomes_seconds_and_survives_a_reset() -> None:
    residency = Residency()

    def look(samples: int, capped: int, second: int) -> dict[str, float | None]:
        metrics = {"accumulation_counter": samples, "ppt_residency_acc": capped, "hbm_thm_residency_acc": ABSENT}
        return {metric: value for metric, value, _ in residency.look(metrics, second * SECOND)}

    assert look(1000, 500, 1) == {"gpu.throttle.power.time": 0.0, "gpu.throttle.reasons": None}
    assert look(2000, 750, 2) == {"gpu.throttle.power.time": 0.25, "gpu.throttle.reasons": 0x4}
    assert look(2000, 750, 3)["gpu.throttle.power.time"] == 0.25
    assert look(4000, 1750, 4)["gpu.throttle.power.time"] == pytest.approx(1.25)
    assert look(10, 5, 5) == {"gpu.throttle.power.time": pytest.approx(1.25), "gpu.throttle.reasons": None}
    assert look(1010, 5, 6) == {"gpu.throttle.power.time": pytest.approx(1.25), "gpu.throttle.reasons": 0.0}


def test_the_slow_violation_call_is_left_to_cards_without_residency(library: FakeAmdSmi) -> None:
    call = (0, "amdsmi_get_violation_status")
    collector = opened()
    collector.read("fast")
    collector.read("slow")
    assert call not in library.calls
    library.failures.absent.add((0, "accumulation_counter"))
    library.cards[0].faults = Faults(power_cap_w=300)
    library.cards[0].work("compute", 0.9)
    library.cards[0].advance(2 * SECOND)
    collector = opened()
    assert "gpu.throttle.power.time" not in metrics_of(collector.read("fast"))
    assert of_card(collector.read("slow"))["gpu.throttle.reasons",] == 0x4


def test_a_socket_in_partitions_has_one_power_meter(without_amdsmi: None) -> None:
    library = fake_amdsmi.install(made_cards(count=3), partitions={1: 1, 2: 2})
    collector = opened()
    readings = collector.read("fast")
    socket = {"hw.power", "hw.energy", "gpu.power.limit", "hw.gpu.io", "gpu.throttle.power.time"}
    assert socket <= metrics_of(readings, 0)
    for partition in (1, 2):
        assert not socket & metrics_of(readings, partition)
        assert {"hw.gpu.utilization", "hw.gpu.memory.usage"} <= metrics_of(readings, partition)
        assert reasons(collector, partition)["hw.energy"] == "partition"
    assert (1, "amdsmi_get_energy_count") not in library.calls


def test_a_link_that_is_down_is_told_from_one_that_is_switched_off(library: FakeAmdSmi) -> None:
    library.cards[0].faults = Faults(nvlink_down=(2,))
    slow = of_card(opened().read("slow"))
    links = {key[1]: value for key, value in slow.items() if key[0] == "gpu.link.up"}
    assert links == {f"xgmi{place}": float(place != 2) for place in range(7)}


def test_resets_and_memory_errors_are_events(library: FakeAmdSmi) -> None:
    collector = opened()
    collector.read("slow")
    library.report_xid(1, 79)
    events = collector.events(1.0)
    assert [(event.kind, event.severity, event.device) for event in events] == [
        ("gpu.reset", "error", "host3/gpu1")
    ]
    library.cards[0].faults = Faults(ecc_uncorrected=2)
    collector.read("slow")
    assert [(event.kind, event.attrs["count"]) for event in collector.events(1.0)] == [("gpu.ras", 2)]
    assert collector.events(0.01) == []


def test_events_without_notices_wait_and_give_what_reading_found(library: FakeAmdSmi) -> None:
    library.failures.missing.add("AmdSmiEventReader")
    collector = opened()
    assert collector.events(0.01) == []
    library.cards[1].faults = Faults(lost=True)
    collector.read("fast")
    assert [event.device for event in collector.events(1.0)] == ["host3/gpu1"]


def test_processes_have_their_memory(library: FakeAmdSmi) -> None:
    found = {use.pid: (use.device, use.memory_bytes) for use in opened().processes()}
    size = library.cards[0].processes[0][1]
    assert found == {4242: ("host3/gpu0", size), 4243: ("host3/gpu1", size)}


# No amdsmi, or one that breaks.

PRINTS = "print('Unable to find libamd_smi.so library')\n"
BREAKS = {
    "no library beneath": PRINTS + "raise KeyError('libamd_smi.so')\n",
    "one symbol missing": PRINTS + "raise AttributeError('undefined symbol: amdsmi_get_gpu_xcd_counter')\n",
    "a dependency missing": "import surely_there_is_no_such_module\n",
    "library not loadable": "raise OSError('libdrm.so.2: cannot open shared object file')\n",
}


def rocm_copy(root: Path, source: str) -> None:
    package = root / "opt/rocm/share/amd_smi/amdsmi"
    package.mkdir(parents=True)
    (package / "half.py").write_text("")
    (package / "__init__.py").write_text("from . import half\n" + source)


@pytest.mark.parametrize("source", BREAKS.values(), ids=BREAKS.keys())
def test_an_amdsmi_that_breaks_is_a_reason_and_prints_nothing(
    source: str, without_amdsmi: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rocm_copy(tmp_path, source)
    path = list(sys.path)
    probe = AmdCollector("host3", root=tmp_path).probe()
    assert not probe.available
    assert "amdsmi" in probe.reason
    assert "/sys/class/drm" in probe.reason
    assert capfd.readouterr() == ("", "")
    assert sys.path == path
    assert not [name for name in sys.modules if name.startswith("amdsmi")]


def test_an_amdsmi_without_a_driver_gives_way_to_the_files(library: FakeAmdSmi, tmp_path: Path) -> None:
    library.failures.init = fake_amdsmi.DRIVER_NOT_LOADED
    assert "finds no driver" in AmdCollector("host3", root=tmp_path).probe().reason
    write_amdgpu(Tree(tmp_path), library.cards)
    assert AmdCollector("host3", root=tmp_path).probe().available


def test_rocm_s_own_copy_goes_first(without_amdsmi: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site/amdsmi"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise KeyError('libamd_smi.so')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    source = (
        "from lens.collectors.simulated.fake_amdsmi import FakeAmdSmi\n"
        "from tests.collectors.test_amd import made_cards\n"
        "library = FakeAmdSmi(made_cards(count=1))\n"
        "def __getattr__(name): return getattr(library, name)\n"
    )
    rocm_copy(tmp_path, source)
    collector = AmdCollector("host3", root=tmp_path)
    assert collector.probe().available
    assert "hw.power" in metrics_of(collector.read("fast"))


# The driver's files alone.


@pytest.fixture
def files(without_amdsmi: None, tmp_path: Path) -> tuple[Tree, list[SimDevice]]:
    tree, cards = Tree(tmp_path), made_cards()
    write_amdgpu(tree, cards)
    # What else is found there: an outlet of a card, and a card of another maker.
    (tmp_path / "sys/class/drm/card0-DP-1").mkdir()
    other = tmp_path / "sys/class/drm/card7/device"
    other.mkdir(parents=True)
    (other / "vendor").write_text("0x10de\n")
    return tree, cards


def device_folder(tree: Tree, index: int = 0) -> Path:
    return tree.root / f"sys/class/drm/card{index}/device"


def refuse(patch: pytest.MonkeyPatch, numbers: dict[str, int]) -> None:
    """Let the driver refuse to read files of these names."""
    read = Path.read_text

    def read_text(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name in numbers:
            raise OSError(numbers[path.name], os.strerror(numbers[path.name]), str(path))
        return read(path, *arguments, **options)

    patch.setattr(Path, "read_text", read_text)


def test_files_alone_give_the_same_values_in_the_same_units(files: tuple[Tree, list[SimDevice]]) -> None:
    tree, cards = files
    collector = opened(root=tree.root)
    assert [device.name for device in collector.devices()] == ["host3/gpu0", "host3/gpu1"]
    found, slow = of_card(collector.read("fast")), of_card(collector.read("slow"))
    card = cards[0]
    assert found["hw.gpu.utilization",] == pytest.approx(0.8, abs=0.01)
    assert found["hw.power", "gpu"] == pytest.approx(card.power_w, abs=1e-3)
    assert found["hw.gpu.memory.usage",] == card.memory_used
    assert found["hw.gpu.memory.limit",] == card.profile.memory_bytes
    assert found["gpu.clock.sm",] == card.clock_mhz
    assert found["gpu.power.limit",] == 750
    assert found["hw.temperature", "core"] == pytest.approx(card.celsius, abs=1e-3)
    assert slow["gpu.clock.sm.max",] == 2100
    assert slow["gpu.pcie.link.speed",] == 32.0
    assert slow["hw.temperature.limit", "critical"] == 100


def test_files_describe_cards_as_the_library_does(files: tuple[Tree, list[SimDevice]]) -> None:
    by_files = opened(root=files[0].root).devices()
    fake_amdsmi.install(files[1])
    by_library = opened().devices()
    for one, other in zip(by_files, by_library, strict=True):
        assert dataclasses.replace(one, driver="") == dataclasses.replace(other, driver="")


def test_a_board_without_a_product_name_is_known_by_its_device_id(files: tuple[Tree, list[SimDevice]]) -> None:
    folder = device_folder(files[0])
    (folder / "product_name").unlink()
    (folder / "device").write_text("0x74a1\n")
    assert opened(root=files[0].root).devices()[0].model == "AMD Instinct MI300X"


def test_a_file_that_the_card_does_not_have_is_absent_with_its_reason(
    files: tuple[Tree, list[SimDevice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, _ = files
    folder = device_folder(tree)
    (folder / "mem_busy_percent").unlink()
    (folder / "pp_dpm_sclk").write_text("S: 19Mhz\n0: 132Mhz\n1: 2100Mhz\n")
    (folder / "current_link_speed").write_text("Unknown\n")
    refuse(monkeypatch, {"gpu_busy_percent": errno.EOPNOTSUPP, "power1_cap": errno.EACCES})
    collector = opened(root=tree.root)
    for _ in range(3):
        found = metrics_of([*collector.read("fast"), *collector.read("slow")])
    why = reasons(collector)
    expected = {
        "gpu.memory.activity": "unsupported",
        "hw.gpu.utilization": "unsupported",
        "gpu.power.limit": "permission",
        "gpu.clock.sm": "no_value",
        "gpu.pcie.link.speed": "no_value",
    }
    assert {metric: why.get(metric) for metric in expected} == expected
    assert not set(expected) & found
    assert "hw.power" in found


def test_a_file_that_is_busy_is_read_again(
    files: tuple[Tree, list[SimDevice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = opened(root=files[0].root)
    with monkeypatch.context() as patch:
        refuse(patch, {"gpu_busy_percent": errno.EBUSY})
        assert "hw.gpu.utilization" not in metrics_of(collector.read("fast"))
    assert "hw.gpu.utilization" in metrics_of(collector.read("fast"))


def test_a_card_that_leaves_the_bus_marks_only_itself_failed(files: tuple[Tree, list[SimDevice]]) -> None:
    tree, cards = files
    collector = opened(root=tree.root)
    cards[1].faults = Faults(lost=True)
    write_amdgpu(tree, cards)
    readings = collector.read("fast")
    assert of_card(readings, 1) == {
        ("hw.status", "ok"): 0,
        ("hw.status", "degraded"): 0,
        ("hw.status", "failed"): 1,
    }
    assert "hw.power" in metrics_of(readings, 0)
    cards[1].faults = Faults()
    write_amdgpu(tree, cards)
    collector.read("slow")
    assert "hw.power" in metrics_of(collector.read("fast"), 1)


def test_the_compute_driver_s_files_say_whose_memory_it_is(files: tuple[Tree, list[SimDevice]]) -> None:
    tree, cards = files
    found = {use.pid: (use.device, use.memory_bytes) for use in opened(root=tree.root).processes()}
    size = cards[0].processes[0][1]
    assert found == {4242: ("host3/gpu0", size), 4243: ("host3/gpu1", size)}


def test_probing_where_there_is_nothing_is_quick_and_says_why(without_amdsmi: None, tmp_path: Path) -> None:
    collector = AmdCollector("host3", root=tmp_path)
    probe = collector.probe()
    assert not probe.available
    assert probe.reason
    assert collector.devices() == collector.read("fast") == collector.processes() == []
    began = time.monotonic()
    assert collector.events(0.05) == []
    assert time.monotonic() - began >= 0.05
    collector.close()
