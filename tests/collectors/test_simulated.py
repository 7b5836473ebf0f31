"""Simulated cards: what the ranks do is what the sensors show."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lens.collectors.simulated.cards import SimulatedCards, SimulationError
from lens.collectors.simulated.device import Faults, SimDevice
from lens.collectors.simulated.profiles import find_profile, load_profiles
from lens.collectors.simulated.workload import RankWorkload, sent_share
from lens.recorder import Recorder
from lens.ring_reader import RingReader
from lens.settings import Settings
from lens.slots import RingPart
from tests.collectors.agent_harness import Host, StubServer
from tests.waiting import wait_for

SECOND = 10**9


def card(**faults: object) -> SimDevice:
    made = SimDevice(load_profiles()["H200"], "GPU-0")
    made.faults = Faults.from_file(faults)
    made.advance(0)
    return made


def run(device: SimDevice, seconds: float, compute: float, comm: float = 0.0, step_s: float = 0.25) -> None:
    """Let the card work: shares of each stretch of time."""
    now = device._now_ns or 0
    for _ in range(int(seconds / step_s)):
        device.work("compute", compute * step_s, flops=compute * step_s * 2.5e9)
        device.work("comm", comm * step_s)
        now += int(step_s * SECOND)
        device.advance(now)


def test_a_card_without_work_idles_and_a_busy_one_does_not() -> None:
    device = card()
    run(device, 3, 0.0)
    assert (device.utilization, device.clock_mhz, device.throttle) == (0.0, 345, 1)
    assert device.power_w == 75
    run(device, 3, 0.7, 0.2)
    assert device.utilization == pytest.approx(0.9)
    assert device.clock_mhz == 1980
    assert 350 < device.power_w < 700
    run(device, 3, 0.0)
    assert device.utilization == 0.0
    assert device.power_w == 75


def test_a_card_that_waits_in_communication_is_fully_used_and_draws_little() -> None:
    device = card()
    run(device, 3, 0.1, 0.9)
    assert device.utilization == pytest.approx(1.0)
    assert device.power_w < 350
    assert device.tensor is not None
    assert device.tensor < 0.1


def test_unknown_work_leaves_the_tensor_share_unknown() -> None:
    device = card()
    device.work("compute", 0.5)
    device.advance(SECOND)
    assert device.tensor is None


def test_a_power_cap_lowers_clock_and_power_and_says_so() -> None:
    device = card(power_cap_w=300)
    run(device, 3, 0.9)
    assert device.power_w == 300
    assert device.clock_mhz < 1980
    assert device.throttle & 0x4
    assert device.totals.power_throttle_s > 0
    assert device.speed_factor < 1


def test_a_hot_card_throttles_with_the_bits_of_heat() -> None:
    device = card(hot=True)
    run(device, 3, 0.9)
    assert device.throttle & 0x60 == 0x60
    assert device.celsius >= 87
    assert device.clock_mhz <= 0.6 * 1980


def test_a_trainer_s_own_slow_down_moves_the_clock_and_nothing_else() -> None:
    device, healthy = card(clock_factor=0.5), card()
    run(device, 3, 0.9)
    run(healthy, 3, 0.9)
    assert device.clock_mhz == healthy.clock_mhz / 2
    assert (device.throttle, device.power_w) == (0, healthy.power_w)
    assert device.speed_factor == 1.0


@given(st.lists(st.tuples(st.floats(0.01, 0.5), st.floats(0, 1)), min_size=1, max_size=40))
def test_busy_time_is_conserved_however_time_is_cut(stretches: list[tuple[float, float]]) -> None:
    device, now, given_s = card(), 0, 0.0
    for seconds, share in stretches:
        device.work("compute", seconds * share)
        given_s += seconds * share
        now += round(seconds * SECOND)
        device.advance(now)
    device.advance(now + SECOND)
    spent = sum(tick.busy["compute"] for tick in device._ticks)
    assert spent <= given_s + 1e-6
    assert device.totals.seconds == pytest.approx((now + SECOND) / SECOND)
    assert device.totals.energy_j >= 75 * device.totals.seconds - 1e-3


def test_the_same_work_gives_the_same_readings() -> None:
    first, second = card(), card()
    for device in (first, second):
        chance = random.Random(3)
        run(device, 5, chance.random(), 0.1)
    assert vars(first.totals) == vars(second.totals)


def test_profiles_are_found_by_the_driver_s_model_name() -> None:
    found = {name: find_profile(name) for name in ("NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3")}
    assert [profile and profile.name for profile in found.values()] == ["H200", "GH200", "H100"]
    assert find_profile("NVIDIA A10") is None
    sections = {"measured", "published", "claimed", "assumed"}
    assert all(set(profile.confidence.values()) <= sections for profile in load_profiles().values())


@pytest.mark.parametrize("text", ["B9000:2", "H200:0", "H200:x", "A10:1"])
def test_what_cannot_be_simulated_is_refused_with_what_can(text: str, tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match="H200"):
        SimulatedCards(text, "h", tmp_path)


def ring_part(tmp_path: Path, write: object) -> RingPart:
    settings = Settings.load(environ={}, rings=tmp_path / "rings", host="h", ring_mib=1)
    recorder = Recorder.create(settings, {"run": "r", "rank": 0})
    write(recorder)  # type: ignore[operator]
    part = RingReader(recorder.path).poll()
    assert part is not None
    return part


def test_phases_and_collectives_become_work_each_moment_counted_once(tmp_path: Path) -> None:
    def write(recorder: Recorder) -> None:
        ids = recorder.intern("all_reduce") | recorder.intern("dp/0") << 32
        recorder.phase(recorder.intern("forward"), 0, 100_000_000, 1)
        recorder.collective(ids, 150_000_000, 190_000_000, 1, 1, 4096)
        recorder.phase(recorder.intern("backward"), 100_000_000, 200_000_000, 1)
        recorder.phase(recorder.intern("data"), 200_000_000, 400_000_000, 1)

    device = card()
    workload = RankWorkload(device, {"groups": {"dp": [[0, 1]]}, "world_size": 2}, frozenset((0, 1)))
    workload.add_open([{"kind": "phase", "name": "backward", "t0": 100_000_000}], 140_000_000)
    workload.add_slots(ring_part(tmp_path, write))
    assert device._pending["comm"] == pytest.approx(0.04)
    assert device._pending["compute"] == pytest.approx(0.04 + 0.06 - 0.04)
    assert device.totals.nvlink_transmit == pytest.approx(4096)
    assert device.totals.pcie_transmit == 0


def test_open_spans_count_up_to_now_and_their_slots_do_not_count_again(tmp_path: Path) -> None:
    device = card()
    workload = RankWorkload(device, {})
    for now in (1, 2, 3):
        workload.add_open([{"kind": "phase", "name": "forward", "t0": 0}], now * 100_000_000)
    workload.add_slots(ring_part(tmp_path, lambda r: r.phase(r.intern("forward"), 0, 350_000_000, 1)))
    assert device._pending["compute"] == pytest.approx(0.35)


def test_flops_are_counted_from_the_ranks_own_counter(tmp_path: Path) -> None:
    def write(recorder: Recorder) -> None:
        columns = recorder.intern("train.loss\x1ftrain.flops")
        for step in range(3):
            recorder.row(columns, [1.0, 1e9 * step], step, step)

    device = card()
    RankWorkload(device, {}).add_slots(ring_part(tmp_path, write))
    assert device._pending_flops == 2e9


@pytest.mark.parametrize(
    ("operation", "expected"), [("all_reduce", 1.5), ("all_to_all", 0.75), ("all_gather", 3.0), ("barrier", 0.0)]
)
def test_bytes_on_the_wire_follow_the_algorithm(operation: str, expected: float) -> None:
    assert sent_share(operation, 4)[0] == expected
    assert sent_share(operation, 1) == (0.0, 0.0)


BUSY_RANK = """
import select, sys, time
from lens.recorder import Recorder
from lens.settings import Settings
r = Recorder.create(Settings.load(), {"run": "r1", "rank": 1, "world_size": 2, "role": "trainer",
                                      "device": "host0/gpu1"})
forward = r.intern("forward")
print("on", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    t0 = time.monotonic_ns(); r.enter_phase(forward, t0, 1)
    time.sleep(0.05)
    r.phase(forward, t0, time.monotonic_ns(), 1)
sys.stdin.readline()
print("off", flush=True)
sys.stdin.readline()
"""


@pytest.mark.processes
def test_cards_move_with_the_work_of_their_rank_and_idle_when_it_stops(host: Host, server: StubServer) -> None:
    rank = host.recording(BUSY_RANK)
    host.agent(LENS_SIMULATE="H200:2", LENS_SHIP_S="0.1")
    assert rank.stdin is not None
    assert rank.stdout is not None

    def power(device: str, since: int) -> list[float]:
        return [
            value
            for metric, value, labels, record in server.samples()
            if metric == "hw.power" and record["device"] == device and record["t0"] > since
        ]

    rank.stdout.readline()
    started = time.monotonic_ns()
    wait_for(lambda: max(power("host0/gpu1", started), default=0) > 300)
    assert set(power("host0/gpu0", started)) == {75.0}
    rank.stdin.write("\n")
    rank.stdin.flush()
    rank.stdout.readline()
    stopped = time.monotonic_ns()
    wait_for(lambda: power("host0/gpu1", stopped)[-1:] == [75.0])
    fault = host.folder / "rings/sim/host0_gpu1.fault.json"
    fault.parent.mkdir(exist_ok=True)
    fault.write_text(json.dumps({"xid": 79}))
    (event,) = wait_for(lambda: server.events("gpu.xid"))
    assert (event["device"], event["rank"], event["attrs"]) == ("host0/gpu1", 1, {"xid": 79})
    ranks = {r["rank"] for m, _, _, r in server.samples() if m == "hw.power" and r["device"] == "host0/gpu1"}
    assert ranks == {1}
    simulated = {labels.get("simulated") for m, _, labels, _ in server.samples() if m.startswith(("hw.", "gpu."))}
    assert simulated == {"true"}
