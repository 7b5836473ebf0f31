"""The real collector and the real pynvml over a library that can be told what to refuse."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest

from lens.collectors.nvidia import NvidiaCollector
from lens.collectors.protocol import Reading
from lens.collectors.simulated import fake_nvml
from lens.collectors.simulated.device import Faults, SimDevice
from lens.collectors.simulated.profiles import load_profiles

NOT_SUPPORTED, NO_PERMISSION, UNKNOWN = 3, 4, 999


@pytest.fixture
def library() -> Iterator[fake_nvml.FakeNvml]:
    pynvml = pytest.importorskip("pynvml")
    cards = [SimDevice(load_profiles()["H200"], f"GPU-{index}", index) for index in range(2)]
    made = fake_nvml.install(cards)
    now = 0
    for card in cards:
        card.advance(now)
        card.work("compute", 0.6, flops=1e10)
        card.work("comm", 0.2)
        card.transfer("nvlink", 1 << 20, 1 << 19)
        card.use_memory([(4242 + card.index, 1 << 20)])
        card.advance(now + 10**9)
    yield made
    pynvml.nvmlLib = None
    pynvml._nvmlGetFunctionPointer_cache.clear()


def opened() -> NvidiaCollector:
    collector = NvidiaCollector("host3", simulated=True)
    assert collector.probe().available
    return collector


def of_card(readings: list[Reading] | object, index: int = 0) -> dict[tuple[str, ...], float]:
    """Values by metric and labels (without simulated) of one card."""
    return {
        (r.metric, *(v for k, v in sorted(r.labels.items()) if k != "simulated")): r.value
        for r in readings  # type: ignore[attr-defined]
        if r.device == f"host3/gpu{index}"
    }


def test_units_are_converted_where_the_value_is_read(library: fake_nvml.FakeNvml) -> None:
    card = library.cards[0]
    found = of_card(opened().read("fast"))
    assert found["hw.gpu.utilization",] == pytest.approx(0.8, abs=0.01)
    assert found["hw.power", "gpu"] == pytest.approx(card.power_w, abs=0.001)
    assert found["hw.energy", "gpu"] == pytest.approx(card.totals.energy_j, abs=0.001)
    assert found["hw.gpu.memory.limit",] == 150_754_820_096
    assert found["hw.gpu.memory.usage",] == card.memory_used
    assert found["hw.gpu.io", "nvlink", "transmit"] == 1 << 20
    assert found["hw.gpu.io", "nvlink", "receive"] == 1 << 19
    assert found["gpu.clock.sm",] == 1980
    assert found["gpu.power.limit",] == 700
    assert found["gpu.link.speed", "nvlink"] == 25e9


def test_means_between_two_samples_come_with_the_second_look(library: fake_nvml.FakeNvml) -> None:
    collector, card = opened(), library.cards[0]
    assert ("gpu.sm.active",) not in of_card(collector.read("fast"))
    card.work("compute", 0.5, flops=5e9)
    card.advance(2 * 10**9)
    time.sleep(0.11)
    found = of_card(collector.read("fast"))
    assert found["gpu.sm.active",] == pytest.approx(0.45, abs=0.02)
    assert found["gpu.tensor.active",] > 0


def test_every_reading_of_a_simulated_card_says_so(library: fake_nvml.FakeNvml) -> None:
    collector = opened()
    readings = [*collector.read("fast"), *collector.read("slow")]
    assert readings
    assert {reading.labels.get("simulated") for reading in readings} == {"true"}
    assert all(device.simulated for device in collector.devices())
    real = NvidiaCollector("host3")
    real.probe()
    assert all("simulated" not in reading.labels for reading in real.read("fast"))


def test_what_a_card_does_not_support_is_absent_and_named_with_the_reason(library: fake_nvml.FakeNvml) -> None:
    library.failures.functions[0, "nvmlDeviceGetUtilizationRates"] = NOT_SUPPORTED
    library.failures.functions[0, "nvmlDeviceGetEnforcedPowerLimit"] = NO_PERMISSION
    library.failures.fields[0, 83] = NOT_SUPPORTED
    library.failures.missing.add("nvmlDeviceGetTemperatureV")
    collector = opened()
    first = collector.read("fast")
    for absent in (("hw.gpu.utilization",), ("gpu.power.limit",), ("hw.energy", "gpu"), ("hw.temperature", "core")):
        assert absent not in of_card(first)
    assert ("hw.gpu.utilization",) in of_card(first, 1), "the other card gives it"
    assert ("hw.temperature", "core") not in of_card(first, 1), "a missing function is missing for all"
    slow = [
        r for r in collector.read("slow") if r.metric == "lens.collector.supported" and r.device == "host3/gpu0"
    ]
    reasons = {reading.labels["metric"]: reading.labels["reason"] for reading in slow}
    assert reasons["hw.gpu.utilization"] == "unsupported"
    assert reasons["gpu.power.limit"] == "permission"
    assert reasons["hw.temperature"] == "missing_symbol"
    assert reasons["hw.energy"] == "unsupported"
    assert {reading.value for reading in slow} == {0.0}


def test_what_is_not_supported_is_asked_for_once(library: fake_nvml.FakeNvml) -> None:
    library.failures.functions[0, "nvmlDeviceGetUtilizationRates"] = NOT_SUPPORTED
    collector = opened()
    collector.read("fast")
    library.failures.functions.clear()
    assert ("hw.gpu.utilization",) not in of_card(collector.read("fast"))


def test_an_error_of_the_moment_is_counted_and_the_metric_asked_for_again(library: fake_nvml.FakeNvml) -> None:
    library.failures.functions[0, "nvmlDeviceGetUtilizationRates"] = UNKNOWN
    collector = opened()
    assert ("hw.gpu.utilization",) not in of_card(collector.read("fast"))
    library.failures.functions.clear()
    assert ("hw.gpu.utilization",) in of_card(collector.read("fast"))
    errors = [r for r in collector.read("slow") if r.metric == "lens.collector.errors"]
    assert [(r.labels["metric"], r.labels["code"], r.value) for r in errors] == [("hw.gpu.utilization", "999", 1.0)]


def test_a_lost_card_marks_only_itself_failed_and_may_come_back(library: fake_nvml.FakeNvml) -> None:
    collector = opened()
    library.cards[0].faults = dataclasses.replace(Faults(), lost=True)
    readings = collector.read("fast")
    assert of_card(readings)["hw.status", "failed"] == 1
    assert of_card(readings)["hw.status", "ok"] == 0
    assert {key[0] for key in of_card(readings)} <= {"hw.status", "lens.collector.supported"}
    assert of_card(readings, 1)["hw.gpu.utilization",] > 0
    assert of_card(collector.read("slow"), 1)["hw.status", "ok"] == 1
    (event,) = collector.events(0.01)
    assert (event.kind, event.severity, event.device) == ("gpu.lost", "error", "host3/gpu0")
    library.cards[0].faults = Faults()
    collector.read("slow")
    assert of_card(collector.read("fast"))["hw.gpu.utilization",] > 0


def test_an_xid_arrives_as_an_event_of_its_card(library: fake_nvml.FakeNvml) -> None:
    collector = opened()
    assert collector.events(0.01) == []
    library.report_xid(1, 79)
    (event,) = collector.events(1.0)
    assert (event.kind, event.device, event.attrs) == ("gpu.xid", "host3/gpu1", {"xid": 79})


def test_processes_on_a_card_are_told_with_their_memory(library: fake_nvml.FakeNvml) -> None:
    uses = {use.pid: use for use in opened().processes()}
    assert uses[4243].device == "host3/gpu1"
    assert uses[4243].memory_bytes == library.cards[1].processes[0][1]


def test_links_and_width_show_a_downgrade(library: fake_nvml.FakeNvml) -> None:
    library.cards[0].faults = dataclasses.replace(Faults(), nvlink_down=(3,), pcie_width=8)
    found = of_card(opened().read("slow"))
    up = {key[1]: value for key, value in found.items() if key[0] == "gpu.link.up"}
    assert len(up) == 18
    assert {link for link, value in up.items() if value == 0} == {"nvlink3"}
    assert found["gpu.pcie.link.width",] == 8
    assert found["gpu.pcie.link.width.max",] == 16


def test_without_a_driver_the_collector_says_why_and_raises_nothing() -> None:
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlLib = None
    pynvml._nvmlGetFunctionPointer_cache.clear()
    collector = NvidiaCollector("host3")
    probe = collector.probe()
    if probe.available:
        pytest.skip("this machine has NVIDIA cards")
    assert "no NVIDIA driver" in probe.reason
    assert collector.devices() == []
    collector.close()
