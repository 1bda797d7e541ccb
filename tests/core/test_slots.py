from __future__ import annotations

import pytest

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
