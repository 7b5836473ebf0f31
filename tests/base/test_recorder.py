"""The ring keeps what was written, counts what was overwritten, and never harms the process that writes."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lens.recorder import Recorder
from lens.ring_files import RecorderError
from lens.ring_reader import RingError, RingReader, write_control
from lens.settings import Settings
from lens.slots import SLOT_BYTES, iter_records, series_key


def configured(folder: Path, **more: object) -> Settings:
    return Settings.load({}, rings=folder / "rings", ring_mib=1, run="a-run", host="host0", **more)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder.create(configured(tmp_path), {"rank": 3})


def test_every_kind_of_record_comes_back_as_written(recorder: Recorder) -> None:
    reader = RingReader(recorder.path)
    operation = recorder.intern("all_reduce") | recorder.intern("dp/0") << 32
    recorder.collective(operation, 3, 4, 5, 7, 1024)
    recorder.phase(recorder.intern("forward"), 2, 5, 5)
    recorder.step(5, 1, 9, tokens=10, overhead_ns=77)
    keys = recorder.intern("\x1f".join(["train.loss", series_key("moe.tokens.kept", {"layer": "1"})]))
    recorder.row(keys, [2.5, math.inf], 10, 5)
    recorder.vector(recorder.intern("moe.expert.tokens"), list(range(40)), 12, 5, layer=2)
    recorder.event("checkpoint.saved", "né" * 300, "warning", attrs={"bytes": 5})
    recorder.span("checkpoint", "save", 20, 30, 5, {"path": "x"})
    part = reader.poll()
    assert part is not None
    collective, phase, step, row, vector, event, span = iter_records(part)
    assert (collective["name"], collective["group"], collective["seq"], collective["bytes"]) == (
        "all_reduce", "dp/0", 7, 1024,
    )  # fmt: skip
    assert (phase["name"], phase["t0"], phase["t1"], phase["rank"]) == ("forward", 2, 5, 3)
    assert (step["tokens"], step["overhead_ns"], step["gc_ns"]) == (10, 77, None)
    assert row["values"] == {"train.loss": 2.5, 'moe.tokens.kept\x1e{"layer":"1"}': math.inf}
    assert (vector["values"], vector["layer"]) == (tuple(float(i) for i in range(40)), 2)
    assert (event["text"], event["severity"], event["attrs"]) == ("né" * 300, "warning", {"bytes": 5})
    assert (span["kind"], span["attrs"]) == ("checkpoint", {"path": "x"})
    assert reader.poll() is None


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=200), limit=st.integers(64, 5000))
def test_any_mix_of_lengths_is_read_back_whole_or_counted(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int
) -> None:
    recorder = Recorder.create(configured(tmp_path_factory.mktemp("ring")), {"rank": 0})
    reader = RingReader(recorder.path)
    metric = recorder.intern("m")
    for length in lengths:
        recorder.vector(metric, [float(length)] * length, 1)
    seen, slots, lost = [], 0, 0
    while (part := reader.poll(limit)) is not None:
        seen += [len(record["values"]) for record in iter_records(part)]
        slots, lost = slots + part.count, lost + part.lost
        assert part.count * SLOT_BYTES == len(part.slots)
    assert slots + lost == recorder.next - 1
    assert seen == lengths[len(lengths) - len(seen) :]
    assert lost > 0 or seen == lengths


def test_a_lapped_reader_counts_what_it_lost_and_goes_on(recorder: Recorder) -> None:
    reader = RingReader(recorder.path)
    phase = recorder.intern("forward")
    for number in range(30_000):
        recorder.phase(phase, 1, 2, number)
    part = reader.poll(100_000)
    assert part is not None
    steps = [record["step"] for record in iter_records(part)]
    assert steps == list(range(30_000 - len(steps), 30_000))
    assert part.lost == 30_000 - len(steps) > 0


def test_open_spans_tell_what_the_process_is_in(recorder: Recorder) -> None:
    reader = RingReader(recorder.path)
    assert reader.open_spans() == []
    assert reader.last_step() is None
    operation = recorder.intern("all_to_all") | recorder.intern("ep/1") << 32
    recorder.enter_step(12, 100)
    recorder.enter_phase(recorder.intern("forward"), 110, 12)
    recorder.enter_collective(operation, 120, 88, 4096, 12)
    assert [(span["kind"], span["name"], span["t0"]) for span in reader.open_spans()] == [
        ("step", "step", 100),
        ("phase", "forward", 110),
        ("collective", "all_to_all", 120),
    ]
    recorder.collective(operation, 120, 130, 12, 88, 4096)
    recorder.phase(recorder.intern("forward"), 110, 140, 12)
    recorder.step(12, 100, 150)
    assert reader.open_spans() == []
    assert reader.last_step() == 12
    last = reader.last_collective()
    assert last is not None
    assert (last["group"], last["seq"], last["bytes"]) == ("ep/1", 88, 4096)


@pytest.mark.processes
def test_a_killed_process_leaves_everything_it_wrote(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from lens.recorder import Recorder
from lens.settings import Settings
recorder = Recorder.create(Settings.load({}, rings=Path(sys.argv[1]), host="host0", ring_mib=8), {"rank": 1})
name, number = recorder.intern("forward"), 0
print(recorder.path, flush=True)
while True:
    recorder.phase(name, number, number + 1, number)
    sys.stdout.write(f"{number}\\n")
    number += 1
    if number % 200 == 0:
        sys.stdout.flush()
        time.sleep(0.001)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "rings")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    path = Path(child.stdout.readline().strip())
    read = [child.stdout.readline() for _ in range(2000)]  # it is at work
    child.kill()
    read += child.stdout.read().splitlines(keepends=True)
    written = [int(line) for line in read if line.endswith("\n")]
    child.wait()
    reader = RingReader(path)
    steps: list[int] = []
    while (part := reader.poll()) is not None:
        steps += [record["step"] for record in iter_records(part)]
    assert reader.lost == 0
    assert len(written) >= 2000
    assert steps[: len(written)] == written
    assert not reader.closed


@pytest.mark.processes
def test_a_forked_child_cannot_touch_its_parents_ring(recorder: Recorder) -> None:
    phase = recorder.intern("forward")
    recorder.phase(phase, 1, 2, 1)
    child = os.fork()
    if child == 0:
        for number in range(20_000):
            recorder.phase(phase, 8, 9, 99)
            recorder.intern(f"of the child {number}")
        recorder.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    recorder.phase(phase, 3, 4, 2)
    reader = RingReader(recorder.path)
    part = reader.poll()
    assert part is not None
    assert [record["step"] for record in iter_records(part)] == [1, 2]
    assert not any("child" in text for text in part.strings)
    assert not reader.closed


def test_a_thread_gets_a_ring_of_its_own(recorder: Recorder) -> None:
    import threading

    paths = []
    thread = threading.Thread(target=lambda: paths.append(recorder.for_thread().path))
    thread.start()
    thread.join()
    assert recorder.for_thread() is recorder
    assert paths[0] != recorder.path
    assert paths[0].parent == recorder.path.parent


def test_files_are_private_and_links_are_refused(recorder: Recorder, tmp_path: Path) -> None:
    assert stat.S_IMODE(recorder.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(recorder.path.parent.stat().st_mode) == 0o700
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(RecorderError, match="not a plain directory"):
        Recorder.create(Settings.load({}, rings=tmp_path / "link", host="h"), {})
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    with pytest.raises(RecorderError, match="not private"):
        Recorder.create(Settings.load({}, rings=shared, host="h"), {})


def test_no_room_is_one_clear_line_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RecorderError, match=r"No space left on device.*LENS_RINGS") as caught:
        Recorder.create(configured(tmp_path), {})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("*.ring")) == []


def test_a_full_string_table_costs_names_not_the_process(recorder: Recorder) -> None:
    numbers = [recorder.intern(f"{number}-{'x' * 1000}") for number in range(400)]
    assert numbers[0] > 0
    assert numbers[-1] == 0
    recorder.phase(numbers[-1], 1, 2, 3)
    part = RingReader(recorder.path).poll()
    assert part is not None
    assert next(iter(iter_records(part)))["name"] is None


def test_control_words_reach_the_hook(recorder: Recorder) -> None:
    assert recorder.control().detach == 0
    write_control(recorder.path, detach=1, profile_step=40)
    assert (recorder.control().detach, recorder.control().profile_step) == (1, 40)


def test_rubbish_is_not_taken_for_a_ring(tmp_path: Path) -> None:
    rubbish = tmp_path / "main.ring"
    for content in (b"", b"short", os.urandom(100_000)):
        rubbish.write_bytes(content)
        with pytest.raises(RingError):
            RingReader(rubbish)


@pytest.mark.processes
def test_a_reader_beside_a_fast_writer_sees_only_whole_records(tmp_path: Path) -> None:
    recorder = Recorder.create(configured(tmp_path), {"rank": 0})
    metric = recorder.intern("m")
    child = os.fork()
    if child == 0:
        # The child reads; the parent, whose ring it is, writes and laps it.
        reader, bad, slots = RingReader(recorder.path), 0, 0
        end = time.monotonic() + 90
        while (slots < 100_000 or not reader.lost) and time.monotonic() < end:
            part = reader.poll()
            if part is None:
                continue
            slots += part.count
            bad += sum(len(set(record["values"])) > 1 for record in iter_records(part))
        os._exit(1 if bad or slots < 100_000 or not reader.lost else 0)
    number = 0
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        for _ in range(100):
            number += 1
            recorder.vector(metric, [float(number)] * 50, number)
    status = ended[1]
    assert os.WIFEXITED(status)
    assert os.WEXITSTATUS(status) == 0
