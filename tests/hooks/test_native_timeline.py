"""Steps and phases in C and in Python: the same calls leave the same records, the same header, the same state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lens.hooks.timeline import Timeline, timeline_of
from lens.hooks.values import Values
from lens.recorder import Recorder
from lens.ring_reader import RingReader, write_control
from lens.settings import Settings
from lens.slots import iter_records

pytestmark = pytest.mark.usefixtures("timeline_library")

NAMES = ("data", "forward", "backward", "optimizer")
small = st.integers(0, 9)
CALLS = st.one_of(
    st.tuples(st.just("begin_step"), st.none() | small, st.none() | small, st.none() | small, st.none() | small),
    st.tuples(st.just("end_step")),
    st.tuples(st.just("abandon_step")),
    st.tuples(st.just("enter"), st.sampled_from(NAMES), small, st.booleans()),
    st.tuples(st.just("leave")),
    st.tuples(st.just("abandon")),
    st.tuples(st.just("begin_wait")),
    st.tuples(st.just("end_wait"), st.booleans()),
    st.tuples(st.just("wait_for"), st.booleans()),
    st.tuples(st.just("found"), st.sampled_from(NAMES)),
    st.tuples(st.just("arrive")),
    st.tuples(st.just("end_alone"), st.booleans()),
    st.tuples(
        st.just("log"),
        st.sampled_from((1, 8, 9, 40)),
        st.none() | small,
        st.integers(-3, 3) | st.floats(allow_nan=False),
    ),
    st.tuples(st.just("elsewhere"), st.sampled_from(NAMES)),
    st.tuples(st.just("while off"), st.sampled_from(NAMES)),
)
STATE = ("step", "phase", "steps", "last_step", "steps_by_hand", "gc_ns")
TIMES = ("t", "t0", "t1", "overhead_ns")


class Side:
    """One of the two, with a ring of its own."""

    def __init__(self, rings: Path, compiled: bool) -> None:
        self.recorder = Recorder.create(Settings.load({}, rings=rings, ring_mib=1, host="test"), {})
        self.timeline = timeline_of(self.recorder, compiled)
        self.values = Values(self.recorder, self.timeline)
        self.timeline.look_at = 2**62

    def do(self, name: str, *words: Any) -> Any:
        timeline = self.timeline
        if name == "enter":
            phase, micro_batch, found = words
            return timeline.enter(timeline.phase_id(phase), micro_batch, found)
        if name == "found":
            return timeline.found(timeline.phase_id(words[0]))
        if name == "wait_for":
            try:
                return timeline.wait_for(next, iter(["batch"] if words[0] else []))
            except StopIteration:
                return "the loader has ended"
        if name == "end_alone":
            (timeline.errands,) = words
            return timeline.end_alone()
        if name == "log":
            width, step, value = words
            return self.values.log({f"metric{place}": value for place in range(width)}, step)
        if name == "elsewhere":
            return in_another_thread(
                lambda: (
                    timeline.here(),
                    timeline.found(timeline.phase_id(words[0])),
                    timeline.new_step(1, None, None, None),
                )
            )
        if name == "while off":
            timeline.part.rest()
            found = timeline.here(), timeline.enter(timeline.phase_id(words[0]), 0, True), timeline.begin_wait()
            timeline.part.wake()
            return found
        result = getattr(timeline, name)(*words)
        return result > 0 if name == "end_step" else result

    def left(self) -> tuple[Any, ...]:
        """All that can be told of it but times."""
        reader = RingReader(self.recorder.path)
        part = reader.poll()
        records = list(iter_records(part)) if part else []
        for one in records:
            assert one["t0"] <= one.get("t1", one["t0"])
        spans = [{key: value for key, value in span.items() if key not in TIMES} for span in reader.open_spans()]
        timeless = [{key: value for key, value in one.items() if key not in TIMES} for one in records]
        state = {name: getattr(self.timeline, name) for name in STATE}
        return timeless, spans, reader.last_step(), state, self.timeline.phase_name(), self.recorder.next


def in_another_thread(act: Callable[[], Any]) -> Any:
    found = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(CALLS, max_size=40))
def test_whatever_is_called_both_do_the_same(calls: list[tuple[Any, ...]], tmp_path_factory: Any) -> None:
    folder: Path = tmp_path_factory.mktemp("timelines")
    sides = [Side(folder / name, name == "c") for name in ("c", "python")]
    assert [type(side.timeline) is Timeline for side in sides] == [False, True]
    for call in calls:
        native, python = (side.do(*call) for side in sides)
        assert native == python, call
    assert sides[0].left() == sides[1].left()
    for side in sides:
        side.recorder.close()


def test_time_spent_is_counted_and_can_be_added_to(tmp_path: Path) -> None:
    side = Side(tmp_path / "rings", True)
    timeline = side.timeline
    timeline.begin_step(0, None, None, None)
    timeline.spent_on_collectives += 5_000_000
    timeline.spent_on_experts += 7_000_000
    timeline.gc_ns += 3_000_000
    timeline.end_step()
    assert 12_000_000 < timeline.all_spent() == timeline.spent + 12_000_000
    part = RingReader(side.recorder.path).poll()
    assert part is not None
    (step,) = iter_records(part)
    assert step["gc_ns"] == 3_000_000
    assert step["overhead_ns"] > 12_000_000
    with pytest.raises(AttributeError):
        timeline.steps = 5


def test_a_step_marked_by_hand_ends_alone_unless_something_else_is_to_be_done(tmp_path: Path) -> None:
    for compiled in (True, False):
        side = Side(tmp_path / str(compiled), compiled)
        timeline, ended = side.timeline, []

        def end(timeline: Timeline = timeline, ended: list[int] = ended) -> None:
            ended.append(timeline.end_step())

        new_step = timeline.steps_end_with(end)
        timeline.errands = False
        for number in range(3):
            with new_step(number, None, None, None):
                assert timeline.step == number
        assert (timeline.steps, len(ended)) == (3, 0)
        timeline.errands = True
        with new_step(None, 7, None, None):
            pass
        timeline.errands = False
        with pytest.raises(KeyError), new_step(None, None, None, None):
            raise KeyError
        write_control(side.recorder.path, detach=1)
        with new_step(None, None, None, None):
            pass
        assert (timeline.steps, len(ended)) == (5, 2)
        part = RingReader(side.recorder.path).poll()
        assert part is not None
        assert [one["step"] for one in iter_records(part)] == [0, 1, 2, 3, 5]


def test_a_recorder_of_another_layout_is_left_to_python() -> None:
    class Other:
        first_word, mask, words, next = 8, 0, memoryview(bytearray(8 * 24)).cast("q"), 1

        def intern(self, name: str) -> int:
            return 1

    assert type(timeline_of(Other(), True)) is Timeline  # type: ignore[arg-type]
