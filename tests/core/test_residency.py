"""The residency map: two-phase moves, limbo, zombies, spare copies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pie_async.core.residency import Block, ResidencyMap
from pie_async.messages import BlockMove


def a_map(*, device: int = 4, host: int = 4, staging: int = 4) -> ResidencyMap:
    return ResidencyMap(
        device_slots=device, host_slots=host, staging_slots=staging, first_staging_slot=10
    )


def owner() -> SimpleNamespace:
    """What the map needs of a sequence."""
    return SimpleNamespace(dirty_from=None)


def a_block(residency: ResidencyMap, *owners: SimpleNamespace, is_sealed: bool = True) -> Block:
    block = residency.allocate(0, owners or (owner(),))
    assert block is not None
    block.is_sealed = is_sealed
    return block


def demoted(residency: ResidencyMap, block: Block, *, is_streamed: bool = False) -> None:
    residency.demote(block, is_streamed=is_streamed)
    residency.finish_demote(block.id)


def used(residency: ResidencyMap) -> tuple[int, int, int]:
    return residency.device.num_used, residency.host.num_used, residency.staging.num_used


# --- moves ------------------------------------------------------------------------------------


def test_a_block_is_readable_where_it_was_until_its_copy_out_is_complete():
    residency = a_map()
    seq = owner()
    block = a_block(residency, seq)
    move = residency.demote(block, is_streamed=True)
    assert move == BlockMove(block.id, block.device_slot, block.host_slot)
    assert (block.is_resident, block.is_clean, block.read_slot) == (True, False, 0)
    assert (residency.moving_out, residency.coming_device) == (1, 1)
    assert seq.dirty_from is None
    residency.finish_demote(block.id)
    assert (block.is_resident, block.is_clean, block.read_slot) == (False, True, 10)
    assert seq.dirty_from == 0
    assert (residency.moving_out, residency.device.num_free) == (0, 4)


def test_a_block_is_readable_only_after_its_copy_in_is_complete():
    residency = a_map()
    seq = owner()
    block = a_block(residency, seq)
    demoted(residency, block)
    assert block.read_slot is None
    move = residency.begin_promote(block)
    assert move == BlockMove(block.id, block.device_slot, block.host_slot)
    assert block.read_slot is None
    residency.finish_promote(block.id)
    assert block.read_slot == block.device_slot
    assert block.is_clean


def test_a_streamed_block_goes_on_being_streamed_until_it_is_home():
    residency = a_map()
    block = a_block(residency)
    demoted(residency, block, is_streamed=True)
    residency.begin_promote(block)
    assert block.read_slot == 10
    residency.finish_promote(block.id)
    assert block.read_slot == 0
    assert residency.num_streamed == residency.staging.num_used == 0


def test_promoting_into_a_full_device_starts_nothing():
    residency = a_map(device=1)
    block = a_block(residency)
    demoted(residency, block)
    a_block(residency)
    assert residency.begin_promote(block) is None
    assert (block.move, residency.moving_in) == (None, 0)


def test_demoting_a_clean_block_again_is_free_and_immediate():
    residency = a_map()
    block = a_block(residency)
    demoted(residency, block)
    residency.begin_promote(block)
    residency.finish_promote(block.id)
    assert block.id in residency.clean_resident
    assert residency.demote(block, is_streamed=True) is None
    assert (block.device_slot, block.read_slot) == (None, 10 + block.host_slot)
    assert residency.clean_resident == {}


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("moving", lambda r, b: r.demote(b, is_streamed=False)),
        ("pool full", lambda r, b: [r.host.take() for _ in range(4)]),
    ],
)
def test_a_block_that_cannot_leave_says_so(reason, spoil):
    residency = a_map()
    block = a_block(residency)
    assert residency.can_demote(block, is_streamed=False)
    spoil(residency, block)
    assert not residency.can_demote(block, is_streamed=False)


def test_streamed_blocks_have_one_number_on_both_sides_while_the_ring_has_it():
    """One that finds no slot of its number takes none that a block after it will want."""
    residency = a_map(device=6, host=6, staging=4)
    blocks = [a_block(residency) for _ in range(6)]
    for block in blocks[:4]:  # parked ones fill the low end, as they do once they were streamed
        demoted(residency, block, is_streamed=True)
        residency.unstage(block)
    demoted(residency, blocks[4], is_streamed=True)
    assert (blocks[4].host_slot, blocks[4].staging_slot) == (4, 13)
    residency.release(blocks[0], blocks[0].owners[0])
    demoted(residency, blocks[5], is_streamed=True)
    assert (blocks[5].host_slot, blocks[5].staging_slot) == (0, 10)


def test_a_full_staging_ring_stops_streaming_but_not_parking():
    residency = a_map(staging=0)
    block = a_block(residency)
    assert not residency.can_demote(block, is_streamed=True)
    assert residency.can_demote(block, is_streamed=False)
    demoted(residency, block)
    assert residency.stage(block) is False


def test_a_block_that_is_not_resident_cannot_leave_again():
    residency = a_map()
    block = a_block(residency)
    demoted(residency, block)
    assert not residency.can_demote(block, is_streamed=False)
    residency.begin_promote(block)
    assert not residency.can_demote(block, is_streamed=False)


# --- limbo --------------------------------------------------------------------------------------


def test_a_slot_is_free_at_once_when_nothing_flies():
    residency = a_map()
    seq = owner()
    residency.release(a_block(residency, seq), seq)
    assert used(residency) == (0, 0, 0)


def test_a_slot_waits_for_the_newest_launch_that_may_touch_it():
    residency = a_map()
    seq = owner()
    block = a_block(residency, seq)
    residency.launched(1)
    residency.launched(2)
    residency.release(block, seq)
    assert residency.device.num_free == 3
    assert residency.limbo_slots(residency.device) == [0]
    assert residency.coming_device == 1
    residency.settled(1)
    assert residency.device.num_free == 3
    residency.settled(2)
    assert residency.device.num_free == 4
    assert residency.coming_device == 0


def test_a_later_launch_does_not_delay_a_slot_freed_before_it():
    residency = a_map()
    seq = owner()
    block = a_block(residency, seq)
    residency.launched(1)
    residency.release(block, seq)
    residency.launched(2)
    residency.settled(1)
    assert residency.device.num_free == 4


def test_leaving_the_device_under_a_launch_keeps_slots_in_limbo_on_every_tier():
    residency = a_map()
    block = a_block(residency)
    demoted(residency, block, is_streamed=True)
    residency.launched(1)
    residency.begin_promote(block)
    residency.finish_promote(block.id)  # the staging slot is read by iteration 1
    assert residency.limbo_slots(residency.staging) == [10]
    residency.reclaim_host(4)  # so is the host slot, by its staging copies
    assert residency.limbo_slots(residency.host) == [0]
    residency.settled(1)
    assert used(residency) == (1, 0, 0)


# --- zombies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_block_released_while_copied_out_is_freed_when_the_copy_ends(is_streamed: bool):
    residency = a_map()
    seq = owner()
    block = a_block(residency, seq)
    residency.demote(block, is_streamed=is_streamed)
    residency.release(block, seq)
    assert used(residency)[:2] == (1, 1), "its slots are still being copied"
    residency.finish_demote(block.id)
    assert used(residency) == (0, 0, 0)
    assert (residency.blocks, residency.streamed, residency.moving_out) == ({}, {}, 0)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_block_released_while_copied_in_is_freed_when_the_copy_ends(is_streamed: bool):
    residency = a_map()
    seq = owner()
    block = a_block(residency, seq)
    demoted(residency, block, is_streamed=is_streamed)
    residency.begin_promote(block)
    residency.release(block, seq)
    assert used(residency)[:2] == (1, 1)
    residency.finish_promote(block.id)
    assert used(residency) == (0, 0, 0)
    assert (residency.blocks, residency.clean_resident, residency.moving_in) == ({}, {}, 0)


# --- sharing ------------------------------------------------------------------------------------


def test_a_shared_block_lives_as_long_as_its_last_owner():
    residency = a_map()
    first, second = owner(), owner()
    block = a_block(residency, first, second)
    residency.release(block, first)
    assert residency.blocks == {block.id: block}
    residency.release(block, second)
    assert residency.blocks == {}


def test_a_move_marks_the_tables_of_all_owners():
    residency = a_map()
    first, second = owner(), owner()
    block = residency.allocate(3, (first, second))
    assert block is not None
    first.dirty_from, second.dirty_from = 7, 2
    demoted(residency, block)
    assert (first.dirty_from, second.dirty_from) == (3, 2)


# --- the pool -------------------------------------------------------------------------------------


def test_spare_copies_make_room_in_a_full_pool_oldest_first():
    residency = a_map(device=4, host=2)
    old, new, wants_room = (a_block(residency) for _ in range(3))
    for block in (old, new):
        demoted(residency, block)
        residency.begin_promote(block)
        residency.finish_promote(block.id)
    assert (residency.host.num_free, residency.available_host) == (0, 2)
    assert residency.can_demote(wants_room, is_streamed=False)
    residency.demote(wants_room, is_streamed=False)
    assert (old.host_slot, new.host_slot is None) == (None, False)


def test_spare_copies_under_a_launch_make_no_room_yet():
    residency = a_map(device=4, host=1)
    block, other = a_block(residency), a_block(residency)
    demoted(residency, block)
    residency.begin_promote(block)
    residency.finish_promote(block.id)
    residency.launched(1)
    assert not residency.can_demote(other, is_streamed=False)
    residency.reclaim_host(1)
    assert not residency.can_demote(other, is_streamed=False)
    residency.settled(1)
    assert residency.can_demote(other, is_streamed=False)


def test_reclaiming_drops_no_more_copies_than_wanted():
    residency = a_map(device=4, host=3)
    blocks = [a_block(residency) for _ in range(3)]
    for block in blocks:
        demoted(residency, block)
        residency.begin_promote(block)
        residency.finish_promote(block.id)
    residency.reclaim_host(1)
    assert residency.host.num_free == 1
    assert len(residency.clean_resident) == 2


def test_a_reopened_tail_block_loses_its_pooled_copy():
    residency = a_map()
    block = a_block(residency, is_sealed=False)
    demoted(residency, block)
    residency.begin_promote(block)
    residency.finish_promote(block.id)
    residency.reopen(block)
    assert (block.host_slot, residency.clean_resident) == (None, {})
    assert residency.host.num_free == 4


def test_a_full_device_allocates_nothing():
    residency = a_map(device=1)
    a_block(residency)
    assert residency.allocate(0) is None
