from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_async.core.slots import SlotPool


def test_the_lowest_free_slot_is_taken_first():
    pool = SlotPool("test", 4)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    pool.give_back(2)
    pool.give_back(0)
    assert [pool.take(), pool.take()] == [0, 2]


def test_an_empty_pool_gives_nothing():
    pool = SlotPool("test", 1)
    assert pool.take() == 0
    assert pool.take() is None
    assert SlotPool("none", 0).take() is None


def test_slots_are_numbered_from_the_first_one():
    pool = SlotPool("staging", 2, first=100)
    assert [pool.take(), pool.take(), pool.take()] == [100, 101, None]
    pool.give_back(101)
    assert (pool.is_free(100), pool.is_free(101)) == (False, True)
    assert pool.num_free == 1


def test_the_highest_free_slot_is_taken_where_that_is_asked_for():
    pool = SlotPool("test", 4, first=10)
    assert [pool.take(is_highest=True), pool.take(), pool.take(is_highest=True)] == [13, 10, 12]
    pool.give_back(13)
    assert [pool.take(is_highest=True), pool.take(), pool.take()] == [13, 11, None]


def test_a_preferred_slot_is_taken_if_it_is_free():
    pool = SlotPool("test", 4)
    assert [pool.take(2), pool.take(2), pool.take(7), pool.take(), pool.take()] == [
        2,
        0,
        1,
        3,
        None,
    ]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.booleans())))
def test_every_slot_has_one_holder_whatever_is_taken_and_given_back(steps):
    pool, held = SlotPool("test", 4), set()
    for number, is_taken, is_highest in steps:
        free = set(range(4)) - held
        if is_taken:
            slot = pool.take(number, is_highest=is_highest)
            expected = number if number in free else None
            if expected is None and free:
                expected = max(free) if is_highest else min(free)
            assert slot == expected
            held |= {slot} - {None}
        elif number in held:
            pool.give_back(number)
            held.remove(number)
        assert pool.num_free == 4 - len(held)


def test_free_and_used_slots_add_up():
    pool = SlotPool("test", 3)
    pool.take()
    assert (pool.num_free, pool.num_used, pool.size) == (2, 1, 3)


def test_giving_a_slot_back_twice_is_caught():
    pool = SlotPool("device", 2)
    pool.take()
    pool.give_back(0)
    with pytest.raises(AssertionError, match="device slot 0 freed twice"):
        pool.give_back(0)


def test_a_pool_grows_and_its_new_slots_are_free():
    pool = SlotPool("test", 1, first=5)
    assert pool.take() == 5
    pool.resize(3)
    assert (pool.size, pool.num_free) == (3, 2)
    assert [pool.take(is_highest=True), pool.take(), pool.take()] == [7, 6, None]


@given(
    st.lists(st.tuples(st.sampled_from(["take", "take_high", "give", "size"]), st.integers(0, 6)))
)
def test_a_pool_of_changing_size_hands_out_its_own_free_slots_alone(steps):
    pool, held = SlotPool("test", 4), set()
    for what, number in steps:
        free = set(range(pool.size)) - held
        if what == "size":
            pool.resize(number)
        elif what == "give" and number in held:
            pool.give_back(number)
            held.remove(number)
        elif what.startswith("take"):
            is_highest = what == "take_high"
            slot = pool.take(is_highest=is_highest)
            assert slot == ((max if is_highest else min)(free) if free else None)
            held |= {slot} - {None}
        assert pool.num_free == len(set(range(pool.size)) - held)
        assert pool.num_retiring == sum(slot >= pool.size for slot in held)
        assert (pool.num_used, pool.end_used) == (len(held), max(held, default=-1) + 1)
