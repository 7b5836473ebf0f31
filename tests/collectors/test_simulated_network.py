"""Simulated AMD hosts and their network: the run's bytes on the wire, read back by the real collectors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens.collectors.amd import AmdCollector
from lens.collectors.nvidia import NvidiaCollector
from lens.collectors.protocol import Reading
from lens.collectors.simulated.cards import SimulatedCards
from lens.collectors.simulated.network import crossing_share
from lens.collectors.simulated.profiles import find_profile, load_profiles, named_profile
from lens.collectors.simulated.workload import RankWorkload
from lens.recorder import Recorder
from lens.ring_reader import RingReader
from lens.settings import Settings

SECOND = 10**9
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_library_stays() -> Iterator[None]:
    yield
    sys.modules.pop("amdsmi", None)
    if "pynvml" in sys.modules:
        sys.modules["pynvml"].nvmlLib = None
        sys.modules["pynvml"]._nvmlGetFunctionPointer_cache.clear()


def host_of(tmp_path: Path, text: str) -> SimulatedCards:
    cards = SimulatedCards(text, "host1", tmp_path / "sim")
    cards.advance(0, {})
    return cards


def run_collectives(workload: RankWorkload, tmp_path: Path, *collectives: tuple[str, str, int]) -> None:
    """Let the rank run (op, group, bytes), each 10 ms long."""
    settings = Settings.load(environ={}, rings=tmp_path / "rings", host="h", ring_mib=1)
    recorder = Recorder.create(settings, {"run": "r", "rank": 0})
    for number, (op, group, size) in enumerate(collectives):
        ids = recorder.intern(op) | recorder.intern(group) << 32
        start = SECOND + number * 20_000_000
        recorder.collective(ids, start, start + 10_000_000, 1, number, size)
    part = RingReader(recorder.path).poll()
    assert part is not None
    workload.add_slots(part)


def found(readings: object, metric: str, **labels: str) -> dict[str | None, float]:
    """Values of a metric by device."""
    wanted = {name.replace("_", "."): value for name, value in labels.items()}
    return {
        r.device: r.value
        for r in readings  # type: ignore[attr-defined]
        if isinstance(r, Reading) and r.metric == metric and wanted.items() <= r.labels.items()
    }


def test_the_maker_of_the_card_decides_which_collector_reads_it(tmp_path: Path) -> None:
    assert isinstance(host_of(tmp_path, "MI400:2").collector(), AmdCollector)
    assert isinstance(host_of(tmp_path, "H200:2").collector(), NvidiaCollector)


def test_a_series_name_stands_for_its_card() -> None:
    assert named_profile("mi400") is load_profiles()["MI455X"]
    assert find_profile("AMD Instinct MI400 series") is load_profiles()["MI455X"]
    assert named_profile("MI999") is None


def test_each_number_of_a_card_has_its_own_confidence() -> None:
    card = load_profiles()["MI455X"]
    assert (card.confidence_of("flops.fp8"), card.confidence_of("flops.bf16")) == ("claimed", "assumed")
    assert card.confidence_of("power.idle_w") == card.confidence["power"] == "assumed"
    assert load_profiles()["MI300X"].confidence_of("power.board_w") == "published"
    assert card.confidence_of("power.no_such_number") == "assumed"
    assert card.confidence_of("nothing") is None


@pytest.mark.parametrize("text", ["MI400:2", "H200:2"])
def test_the_bytes_that_leave_the_host_are_the_bytes_of_its_ports(text: str, tmp_path: Path) -> None:
    cards = host_of(tmp_path, text)
    about = {"device": "host1/gpu0", "world_size": 4, "groups": {"ep": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]]}}
    workload = cards.workload(about, [2, 3])
    assert workload is not None
    run_collectives(
        workload,
        tmp_path,
        ("all_to_all", "ep/1", MIB),
        ("all_reduce", "dp/0", MIB),
        ("all_gather", "world/0", 1000),
    )
    cards.advance(SECOND, {})
    fabric = cards.network_collector()
    assert fabric.probe().available
    readings = fabric.read("fast")
    nic = next(name for name in found(readings, "hw.network.up") if name and name.endswith("_0"))
    # Within ep/1 nothing leaves; dp/0 has one rank here; the world's ring is shared by two network cards.
    sent = found(readings, "hw.network.io", network_io_direction="transmit")
    assert sent[nic] == pytest.approx(MIB + 1000 * 3 / 2, abs=4)
    assert sum(sent.values()) == sent[nic]
    assert {reading.labels["simulated"] for reading in readings} == {"true"}


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce"])
def test_a_group_on_one_host_sends_nothing_abroad(op: str) -> None:
    assert crossing_share(op, 4, 4) == (0.0, 0.0)
    assert crossing_share(op, 4, 2)[0] > 0


def test_a_ring_costs_the_host_the_same_however_many_ranks_it_has() -> None:
    for op in ("all_reduce", "reduce_scatter"):
        alone, shared = crossing_share(op, 8, 1)[0], crossing_share(op, 8, 4)[0]
        assert alone == pytest.approx(4 * shared)


def test_a_fault_of_a_port_shows_in_its_counters(tmp_path: Path) -> None:
    cards = host_of(tmp_path, "H200:2")
    fabric = cards.network_collector()
    fabric.probe()
    fabric.read("fast")
    fault = tmp_path / "sim/host1_mlx5_1.fault.json"
    fault.write_text(json.dumps({"down": True, "congested": 0.5, "retransmits": 9, "unknown": 1}))
    cards.advance(2 * SECOND, {})
    fast, slow = fabric.read("fast"), fabric.read("slow")
    assert found(fast, "hw.network.up") == {"host1/mlx5_0": 1, "host1/mlx5_1": 0}
    assert found(fast, "net.ib.xmit_wait.time")["host1/mlx5_1"] == pytest.approx(1.0)
    assert found(slow, "net.rdma.retransmits")["host1/mlx5_1"] == 9
    assert found(slow, "net.roce.cnp_handled")["host1/mlx5_1"] > 0
    assert found(slow, "net.roce.cnp_handled")["host1/mlx5_0"] == 0
    fault.write_text('{"down": tr')
    cards.advance(3 * SECOND, {})
    assert found(fabric.read("fast"), "hw.network.up")["host1/mlx5_1"] == 0
    fault.unlink()
    cards.advance(4 * SECOND, {})
    assert found(fabric.read("fast"), "hw.network.up")["host1/mlx5_1"] == 1
    assert found(fabric.read("slow"), "net.ib.link_downed")["host1/mlx5_1"] == 1
    assert [event.kind for event in fabric.events(0.05)] == ["net.link.down", "net.link.up"]


def test_a_simulated_amd_card_shows_what_its_rank_does(tmp_path: Path) -> None:
    cards = host_of(tmp_path, "MI400:1")
    card = cards.cards["host1/gpu0"]
    collector = cards.collector()
    assert collector.probe().available
    (tmp_path / "sim").mkdir(exist_ok=True)
    (tmp_path / "sim/host1_gpu0.fault.json").write_text(json.dumps({"hot": True}))
    for second in (1, 2, 3):
        card.work("compute", 0.9)
        cards.advance(second * SECOND, {"host1/gpu0": [(77, 3 << 20)]})
        readings = collector.read("fast")
    device = "host1/gpu0"
    assert found(readings, "hw.gpu.utilization")[device] == pytest.approx(0.9, abs=0.01)
    assert int(found(readings, "gpu.throttle.reasons")[device]) & 0x40
    assert found(readings, "gpu.throttle.thermal.time", source="socket")[device] > 0
    assert [(use.pid, use.device) for use in collector.processes()] == [(77, device)]
    assert json.loads((tmp_path / "sim/host1_gpu0.state.json").read_text())["speed_factor"] < 1
