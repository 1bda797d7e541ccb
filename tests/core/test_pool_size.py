"""The host pool's size follows its use, chunk by chunk, and nothing that is held is given back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pie_async.core.pool_size import PoolSize
from pie_async.core.slots import SlotPool


def shrink_all(size: PoolSize) -> int:
    """Review, and give chunk after chunk back, as a device that does it at once."""
    size.review()
    while size.is_changing:
        size.told(size.target, is_all=False)
        size.shrink()
    return size.present


def test_a_pool_that_was_not_needed_for_a_period_keeps_one_chunk():
    pool = SlotPool("host", 40)
    size = PoolSize(pool, ceiling=40, chunk_slots=10)
    taken = [pool.take() for _ in range(15)]
    assert size.grow() is None
    for slot in taken:
        pool.give_back(slot)
    assert size.review() == 30, "the period needed 15 and a chunk more"
    assert not size.told(30, is_all=False)
    assert size.shrink() == 30, "no more was let go of"
    assert (size.review(), pool.size) == (20, 10), "one chunk at a time"
    assert size.shrink() == 20, "it is at it"
    size.told(20, is_all=False)
    assert size.shrink() == 10
    size.told(10, is_all=False)
    assert size.shrink() == 10
    assert (pool.size, size.growable) == (10, 30)


def test_slots_in_use_at_the_end_are_not_given_back_but_not_handed_out_again():
    pool = SlotPool("host", 40)
    size = PoolSize(pool, ceiling=40, chunk_slots=10)
    last = pool.take(is_highest=True)
    assert (size.review(), size.review()) == (40, 40)
    assert [pool.take(is_highest=True) for _ in range(2)] == [19, 18]
    pool.give_back(last)
    size.review()
    assert shrink_all(size) == 20


def test_it_grows_when_free_slots_run_short_and_not_while_it_is_at_it():
    pool = SlotPool("host", 10)
    size = PoolSize(pool, ceiling=40, chunk_slots=10)
    size.told(10, is_all=True)  # the operating system refused
    assert (size.ceiling, size.grow(), size.growable) == (10, None, 0)

    size = PoolSize(pool, ceiling=40, chunk_slots=10)
    size.told(40, is_all=True)
    shrink_all(size)
    pool.take()
    assert size.is_short and size.grow() == 20
    assert size.grow() is None and size.is_changing
    size.told(20, is_all=False)
    assert (pool.size, size.is_short, size.is_changing) == (20, False, False)


def test_a_refusal_while_it_grows_is_its_new_ceiling():
    pool = SlotPool("host", 40)
    size = PoolSize(pool, ceiling=40, chunk_slots=10)
    shrink_all(size)
    pool.take()
    size.grow()
    assert not size.told(10, is_all=True)
    assert (size.ceiling, size.growable, size.is_short) == (10, 0, False)


def test_without_chunks_it_keeps_what_it_was_told():
    pool = SlotPool("host", 3)
    size = PoolSize(pool, ceiling=9, chunk_slots=0)
    assert (size.growable, size.grow(), size.is_short) == (0, None, False)
    assert size.told(5, is_all=False)
    assert not size.told(9, is_all=True)
    assert (pool.size, size.growable) == (9, 0)


@given(
    st.integers(1, 30),
    st.integers(1, 8),
    st.lists(st.sampled_from(["take", "take", "take_high", "give", "review", "told"])),
)
def test_memory_lies_under_every_slot_that_is_held_or_free(ceiling, chunk, steps):
    chunk = min(chunk, ceiling)
    pool, held, memory = SlotPool("host", chunk), [], chunk
    size = PoolSize(pool, ceiling=ceiling, chunk_slots=chunk)
    for step in [*steps, "told", "give", "review", "told", "review", "told"]:
        if step.startswith("take"):
            slot = pool.take(is_highest=step == "take_high")
            held += [] if slot is None else [slot]
            size.grow()
        elif step == "give" and held:
            pool.give_back(held.pop(0))
            size.grow()
        elif step == "review":
            size.review()
            memory = min(memory, size.target)  # what goes, goes at once
        elif step == "told":
            memory = size.target
            size.told(memory, is_all=memory == ceiling)
            size.grow()
        assert pool.size <= memory and max(held, default=-1) < memory <= ceiling
        assert pool.num_free or size.is_changing or not size.growable, "or it would wait for good"
