"""Every way in which the books can be wrong is noticed: each is written in by hand."""

from __future__ import annotations

import pytest

from pie_async.core import invariants
from pie_async.core.invariants import InvariantBroken
from pie_async.core.schedule import Schedule
from pie_async.core.sequence import State
from tests.support.perfect_device import PerfectDevice, a_schedule


@pytest.fixture
def schedule() -> Schedule:
    """Two sequences run, the second with a streamed block; one is parked, one waits."""
    device = PerfectDevice(a_schedule(device_slots=20, max_running=3, streamed_limit=8))
    for _ in range(4):
        device.submit(9, 20)
    device.plan()
    device.settle()
    schedule = device.schedule
    schedule.park(schedule.sequences[3])
    residency = schedule.residency
    moves = [residency.demote(schedule.sequences[2].table[0], is_streamed=True)]
    moves += [residency.demote(schedule.sequences[3].table[0], is_streamed=False)]
    device.swap_outs.append(moves)
    device.finish_swap_out()
    return schedule


def first(schedule: Schedule):
    return schedule.sequences[1]


def second(schedule: Schedule):
    return schedule.sequences[2]


def parked(schedule: Schedule):
    return schedule.sequences[3]


def copy_without_slots(schedule: Schedule) -> None:
    first(schedule).table[0].move = "out"


def slot_held_twice(schedule: Schedule) -> None:
    table = first(schedule).table
    table[0].device_slot = table[1].device_slot


def slot_leaked(schedule: Schedule) -> None:
    schedule.residency.device.take()


def host_slot_leaked(schedule: Schedule) -> None:
    schedule.residency.host.take()


def staging_slot_leaked(schedule: Schedule) -> None:
    schedule.residency.staging.take()


def slot_free_and_mapped(schedule: Schedule) -> None:
    schedule.residency.device.give_back(first(schedule).table[0].device_slot)


def block_nowhere(schedule: Schedule) -> None:
    block = first(schedule).table[0]
    schedule.residency.device.give_back(block.device_slot)
    block.device_slot = None


def spare_copy_not_listed(schedule: Schedule) -> None:
    block = first(schedule).table[0]
    block.host_slot = schedule.residency.host.take()


def streamed_not_listed(schedule: Schedule) -> None:
    schedule.residency.streamed.clear()


def block_without_owner(schedule: Schedule) -> None:
    block = schedule.residency.allocate(0)
    assert block is not None


def owner_not_listed(schedule: Schedule) -> None:
    first(schedule).table[0].owners = (second(schedule),)


def owner_without_block(schedule: Schedule) -> None:
    first(schedule).table[0].owners += (second(schedule),)


def settled_too_far(schedule: Schedule) -> None:
    first(schedule).num_settled = first(schedule).num_launched + 1


def launched_past_the_table(schedule: Schedule) -> None:
    first(schedule).num_launched = 100


def waiting_with_blocks(schedule: Schedule) -> None:
    first(schedule).state = State.WAITING


def running_unreadable(schedule: Schedule) -> None:
    schedule.residency.unstage(second(schedule).table[0])


def running_without_lane(schedule: Schedule) -> None:
    first(schedule).lane = None


def writes_to_a_pooled_block(schedule: Schedule) -> None:
    second(schedule).num_sealed = 0


def open_block_with_a_copy(schedule: Schedule) -> None:
    residency = schedule.residency
    block = second(schedule).table[0]
    residency.begin_promote(block)
    residency.finish_promote(block.id)
    residency.cache.forget(block)
    block.is_sealed = False


def wrong_queue(schedule: Schedule) -> None:
    schedule.running.append(schedule.parked.pop())


def in_no_queue(schedule: Schedule) -> None:
    schedule.parked.clear()


def waiting_miscounted(schedule: Schedule) -> None:
    schedule.num_waiting += 1


def end_first(schedule: Schedule):
    """The first sequence ends; two of its blocks are cached then. The older one."""
    schedule.finish(first(schedule), "abort")
    (block, _), _ = schedule.residency.cache.cached()
    return block


def cached_with_owner(schedule: Schedule) -> None:
    block = first(schedule).table[0]
    schedule.residency.cache.keep(block, read_until=None)


def cached_after_its_end(schedule: Schedule) -> None:
    block = end_first(schedule)
    schedule.residency.device.give_back(block.device_slot)
    del schedule.residency.blocks[block.id]


def ownerless_not_cached(schedule: Schedule) -> None:
    schedule.residency.cache.take_up(end_first(schedule))


def cached_unsealed(schedule: Schedule) -> None:
    end_first(schedule).is_sealed = False


def cached_with_a_copy(schedule: Schedule) -> None:
    block = end_first(schedule)
    block.host_slot = schedule.residency.host.take()
    schedule.residency.clean_resident[block.id] = block


def cached_not_found(schedule: Schedule) -> None:
    schedule.residency.cache.forget(end_first(schedule))


def cached_hot_for_nobody(schedule: Schedule) -> None:
    block = end_first(schedule)
    schedule.residency.cache.take_up(block)
    schedule.residency.cache.keep(block, read_until=1)


def cached_out_of_order(schedule: Schedule) -> None:
    end_first(schedule)
    cache = schedule.residency.cache
    for read_until, (block, _) in zip((9, 8), list(cache.cached()), strict=True):
        cache.take_up(block)
        cache.keep(block, read_until=read_until)


def index_out_of_date(schedule: Schedule) -> None:
    schedule.residency.cache.index[b"digest"] = first(schedule).table[0]


def others_tokens(schedule: Schedule) -> None:
    first(schedule).tokens[0] += 1


def lane_leaked(schedule: Schedule) -> None:
    schedule.lanes.take()


CORRUPTIONS = {
    copy_without_slots: "copied without both slots",
    slot_held_twice: "held twice",
    slot_leaked: "device slots leak",
    host_slot_leaked: "host slots leak",
    staging_slot_leaked: "staging slots leak",
    slot_free_and_mapped: "free and in use",
    block_nowhere: "lies nowhere",
    spare_copy_not_listed: "spare-copy list",
    streamed_not_listed: "streamed list",
    block_without_owner: "no owner",
    owner_not_listed: "without owning it",
    owner_without_block: "owners, tables hold",
    settled_too_far: "settled more than it launched",
    launched_past_the_table: "launched past its table",
    waiting_with_blocks: "waits but holds blocks",
    running_unreadable: "cannot be read",
    running_without_lane: "without a lane",
    writes_to_a_pooled_block: "not resident",
    open_block_with_a_copy: "pooled copies",
    wrong_queue: "queue",
    in_no_queue: "queued of",
    waiting_miscounted: "counted",
    lane_leaked: "lanes for",
    cached_with_owner: "cached but has owners",
    cached_after_its_end: "not in the books",
    ownerless_not_cached: "no owner",
    cached_unsealed: "not sealed",
    cached_with_a_copy: "copied, pooled",
    cached_not_found: "not found by its digest",
    cached_hot_for_nobody: "which is over",
    cached_out_of_order: "cools behind",
    index_out_of_date: "prefix index",
    others_tokens: "other tokens",
}


def test_a_sound_schedule_passes(schedule: Schedule):
    invariants.check(schedule)


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_a_broken_invariant_is_named(schedule: Schedule, corrupt):
    corrupt(schedule)
    with pytest.raises(InvariantBroken, match=CORRUPTIONS[corrupt]):
        invariants.check(schedule)
