"""Which batches were taken: a set of numbers that stays small."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lens.store.seen import NumberSet, SeenBatches


@given(st.lists(st.integers(0, 60)))
def test_behaves_as_a_set(numbers: list[int]) -> None:
    expected: set[int] = set()
    kept = NumberSet()
    for number in numbers:
        assert kept.add(number) is (number not in expected)
        expected.add(number)
    assert {number for number in range(62) if number in kept} == expected
    assert len(kept) == len(expected)


@given(st.permutations(range(40)))
def test_a_run_of_numbers_is_one_range_in_whatever_order_it_came(numbers: list[int]) -> None:
    assert NumberSet(numbers).ranges == [(0, 40)]


def test_numbers_belong_to_a_run_and_a_source() -> None:
    seen = SeenBatches()
    seen.add(1, "agent:a", 7)
    assert seen.has(1, "agent:a", 7)
    assert not seen.has(2, "agent:a", 7)
    assert not seen.has(1, "agent:b", 7)
    assert not seen.has(1, "agent:a", 8)
