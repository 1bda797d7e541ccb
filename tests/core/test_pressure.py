"""Who leaves the device, who is parked, who comes back, and what is never refused."""

from __future__ import annotations

import pytest

from pie_async.core.pressure import LOOKAHEAD_ITERATIONS, PATIENCE_PLANS, preempt
from pie_async.core.sequence import State
from tests.support.perfect_device import (
    PerfectDevice,
    a_schedule,
    assert_all_returned,
    token_at,
)


def settled(device: PerfectDevice, steps: int = 1) -> None:
    """Step, then let everything in flight end."""
    for _ in range(steps):
        device.step()
    while device.num_flying:
        device.settle()


def park(device: PerfectDevice, sequence: int) -> None:
    """Park a settled sequence and send all its blocks to the pool, as the copies begin."""
    schedule = device.schedule
    seq = schedule.sequences[sequence]
    schedule.park(seq)
    moves = [schedule.residency.demote(block, is_streamed=False) for block in seq.table]
    device.swap_outs.append([move for move in moves if move is not None])


def states(device: PerfectDevice) -> dict[int, str]:
    return {seq.id: seq.state.value for seq in device.schedule.sequences.values()}


def expected(sequence: int, prompt_len: int, count: int) -> list[int]:
    return [token_at(sequence, prompt_len + i) for i in range(count)]


# --- parking ------------------------------------------------------------------------------


def test_the_newest_sequence_is_parked_first_and_loses_no_token():
    device = PerfectDevice(a_schedule(device_slots=6, host_slots=20))
    old, new = device.submit(4, 30)[0], device.submit(4, 30)[0]
    seen = set()
    while not device.is_quiet:
        device.step()
        seen |= {seq.id for seq in device.schedule.parked}
    assert seen == {new}
    assert device.outputs == {old: expected(old, 4, 30), new: expected(new, 4, 30)}
    assert device.schedule.counts.preemptions_recomputed == 0
    assert device.schedule.counts.preemptions_parked >= 1


def test_a_later_priority_is_parked_before_an_earlier_arrival():
    device = PerfectDevice(a_schedule(device_slots=6, host_slots=20))
    device.submit(4, 30, priority=1)
    device.submit(4, 30, priority=0)
    parked = []
    while not device.is_quiet and not parked:
        device.step()
        parked = [seq.id for seq in device.schedule.parked]
    assert parked == [1]


def test_without_a_pool_preemption_recomputes_and_tokens_stay_the_same():
    device = PerfectDevice(a_schedule(device_slots=6, host_slots=0))
    device.submit(4, 19)
    device.submit(4, 19)
    device.run()
    counts = device.schedule.counts
    assert counts.preemptions_recomputed >= 1
    assert counts.demotions == counts.promotions == 0
    assert device.outputs == {1: expected(1, 4, 19), 2: expected(2, 4, 19)}


def test_when_the_pool_is_full_the_sequence_that_would_come_back_last_is_recomputed():
    device = PerfectDevice(a_schedule(device_slots=8, host_slots=2))
    for _ in range(3):
        device.submit(4, 27)
    dropped = []
    schedule_type = type(device.schedule)

    class Watching(schedule_type):
        __slots__ = ()

        def drop(self, seq):
            others = [p.order for p in self.parked if p.launches_in_flight == 0]
            assert seq.order == max(others)
            dropped.append(seq.id)
            schedule_type.drop(self, seq)

    device.schedule.__class__ = Watching
    device.run()
    assert dropped
    assert device.schedule.counts.preemptions_recomputed == len(dropped)
    assert device.outputs == {s: expected(s, 4, 27) for s in (1, 2, 3)}


def test_parked_sequences_come_back_in_serving_order():
    device = PerfectDevice(a_schedule(device_slots=10, host_slots=40))
    for _ in range(4):
        device.submit(8, 25)
    returned = []
    before: list[int] = []
    while not device.is_quiet:
        device.step()
        parked = [seq.id for seq in device.schedule.parked]
        gone = [s for s in before if s not in parked and s in device.schedule.sequences]
        returned += gone
        assert all(s < min(parked, default=99) for s in gone)
        before = parked
    assert returned
    assert device.outputs == {s: expected(s, 8, 25) for s in (1, 2, 3, 4)}


def test_a_parked_sequence_whose_blocks_are_all_shared_does_not_block_the_next_parking():
    """Its shared blocks cannot leave: others read them. Someone else must."""
    device = PerfectDevice(a_schedule(device_slots=8, host_slots=30))
    device.submit(8, 14, n=3)
    device.run()
    assert device.outputs == {s: expected(s, 8, 14) for s in (1, 2, 3)}
    assert_all_returned(device.schedule)


def test_a_resuming_sequence_finds_the_lane_it_needs():
    """However many arrive while its copies are under way."""
    device = PerfectDevice(a_schedule(max_running=2))
    old, new = device.submit(6, 20)[0], device.submit(6, 20)[0]
    settled(device, 2)
    park(device, new)
    device.finish_swap_out()
    device.plan()
    assert states(device) == {old: "running", new: "resuming"}
    late = device.submit(6, 3, priority=-1)[0]
    settled_before = states(device)[late]
    device.plan()
    device.finish_swap_in()
    assert settled_before == states(device)[late] == "waiting"
    assert states(device)[new] == "running"
    device.run()
    assert_all_returned(device.schedule)


def test_a_resuming_sequence_reads_nothing_before_its_copies_are_complete():
    device = PerfectDevice(a_schedule())
    device.submit(6, 20)
    new = device.submit(6, 20)[0]
    settled(device, 2)
    park(device, new)
    device.finish_swap_out()
    plans = [device.plan() for _ in range(2)]
    assert device.swap_ins
    assert all(row.sequence != new for plan in plans for row in plan.rows)
    device.finish_swap_in()
    assert any(row.sequence == new for row in device.plan().rows)


def test_a_sequence_is_not_resumed_while_an_iteration_it_is_part_of_flies():
    device = PerfectDevice(a_schedule(device_slots=16, host_slots=16))
    device.submit(6, 20)
    new = device.submit(6, 20)[0]
    settled(device, 2)
    device.plan_ahead()
    device.schedule.park(device.schedule.sequences[new])
    device.plan()
    assert states(device)[new] == "parked"
    device.settle()
    device.settle()
    device.plan()
    assert states(device)[new] == "running"


# --- leaving the device ---------------------------------------------------------------------


def leaving(device: PerfectDevice) -> list[int]:
    """Blocks in the order in which they were sent to the pool."""
    return [move.block for plan in device.plans for move in plan.swap_out]


def test_blocks_of_parked_sequences_leave_before_those_of_running_ones():
    device = PerfectDevice(a_schedule(device_slots=9, host_slots=30, streamed_limit=30))
    device.submit(8, 40)
    new = device.submit(8, 40)[0]
    settled(device, 2)
    seq = device.schedule.sequences[new]
    device.schedule.park(seq)
    parked_blocks = {block.id for block in seq.table}
    # A third one, served first, wants their room.
    device.submit(16, 4, priority=-1)
    device.plan()
    assert leaving(device)
    assert set(leaving(device)) <= parked_blocks


def test_of_running_sequences_the_newest_ones_oldest_block_is_streamed_first():
    device = PerfectDevice(a_schedule(device_slots=8, host_slots=30, streamed_limit=30))
    device.submit(8, 20)
    new = device.submit(8, 20)[0]
    first_block = None
    while not leaving(device):
        device.step()
        if new in device.schedule.sequences and device.schedule.sequences[new].table:
            first_block = device.schedule.sequences[new].table[0].id
    assert leaving(device)[0] == first_block


def test_a_clean_block_leaves_at_once_and_for_free():
    device = PerfectDevice(a_schedule(device_slots=16, host_slots=16, streamed_limit=16))
    sequence = device.submit(12, 40)[0]
    settled(device, 2)
    park(device, sequence)
    device.finish_swap_out()
    device.plan()
    device.finish_swap_in()  # all its blocks are resident again, with copies in the pool
    schedule = device.schedule
    clean = list(schedule.residency.clean_resident)
    assert clean
    copied = len(leaving(device))
    schedule.residency.launched(10_000)
    block = schedule.residency.blocks[clean[0]]
    assert schedule.residency.demote(block, is_streamed=True) is None
    assert block.device_slot is None
    assert block.is_streamed
    assert len(leaving(device)) == copied


def test_a_block_about_to_leave_for_good_is_not_shared_with_a_new_sequence():
    """Its old owner is parked, so nothing will stage it once it is gone."""
    device = PerfectDevice(a_schedule(device_slots=20))
    prompt = range(500, 513)
    sequence = device.submit(prompt, 30)[0]
    other = device.submit(6, 30)[0]
    settled(device, 2)
    park(device, sequence)
    late = device.submit(prompt, 5, priority=-1)[0]
    device.plan()
    assert states(device) == {sequence: "parked", other: "running", late: "running"}
    device.finish_swap_out()  # checks that everything running can still be read
    device.run()
    assert device.outputs[late] == expected(late, 13, 5)
    assert_all_returned(device.schedule)


def test_room_for_the_next_block_is_made_before_it_is_needed():
    device = PerfectDevice(a_schedule(device_slots=4, host_slots=30, streamed_limit=30))
    device.submit(9, 30)
    settled(device, 1)
    seq = device.schedule.sequences[1]
    while not device.swap_outs:
        device.plan()
        if device.swap_outs:
            break
        device.settle()
    left = len(seq.table) * 4 - seq.num_launched
    assert 0 < left <= LOOKAHEAD_ITERATIONS
    assert not device.schedule.num_starved


# --- the limit ------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 3, 6])
def test_no_more_is_streamed_than_the_limit_allows(limit: int):
    device = PerfectDevice(a_schedule(device_slots=10, host_slots=60, streamed_limit=limit))
    for _ in range(4):
        device.submit(8, 30)
    schedule, most = device.schedule, 0

    def are_several() -> bool:
        return len(schedule.running) + len(schedule.resuming) > 1

    while not device.is_quiet:
        # Alone, a sequence may stream everything; beside others nothing more beyond the limit.
        before, were_several = schedule.residency.num_streamed, are_several()
        device.plan()
        if were_several and are_several():
            most = max(most, schedule.residency.num_streamed)
            assert schedule.residency.num_streamed <= max(limit, before)
        device.step()
    if limit >= 3:
        assert most > 0, "the limit was never used"
    assert device.outputs == {s: expected(s, 8, 30) for s in (1, 2, 3, 4)}


def test_streaming_lets_more_sequences_run_at_once():
    def most_running(limit: int) -> int:
        device = PerfectDevice(a_schedule(device_slots=10, host_slots=60, streamed_limit=limit))
        for _ in range(6):
            device.submit(12, 12)
        most = 0
        while not device.is_quiet:
            device.step()
            most = max(most, len(device.schedule.running))
        return most

    assert most_running(20) > most_running(0)


def test_a_lowered_limit_parks_sequences_until_it_is_respected():
    device = PerfectDevice(a_schedule(device_slots=10, host_slots=60, streamed_limit=20))
    for _ in range(4):
        device.submit(12, 30)
    while device.schedule.residency.num_streamed < 6:
        device.step()
    schedule = device.schedule
    schedule.streamed_limit = 0
    parked = schedule.counts.preemptions_parked
    for _ in range(12):
        device.step()
        if schedule.residency.num_streamed <= 1 or len(schedule.running) == 1:
            break
    else:
        raise AssertionError(f"still streaming: {device.describe()}")
    assert schedule.counts.preemptions_parked > parked
    assert schedule.counts.preemptions_parked > 0
    device.run()
    assert device.outputs == {s: expected(s, 12, 30) for s in (1, 2, 3, 4)}


def test_under_a_limit_that_was_lowered_a_little_sequences_grow_and_none_starts():
    device = PerfectDevice(a_schedule(device_slots=30, host_slots=90, streamed_limit=40))
    for _ in range(8):
        device.submit(12, 60)
    schedule = device.schedule
    while schedule.residency.num_streamed < 30:
        device.step()
    assert schedule.shrink_tolerance > 1.0
    streamed = schedule.residency.num_streamed
    schedule.streamed_limit = streamed
    most = int(streamed * schedule.shrink_tolerance)
    running = set(schedule.running)
    device.submit(12, 12)
    while schedule.residency.num_streamed <= streamed:
        device.step()
    assert set(schedule.running) <= running
    assert not schedule.num_starved and not schedule.parked
    while not schedule.parked:
        device.step()
        assert schedule.residency.num_streamed <= most
    device.run()
    assert device.outputs == {s: expected(s, 12, 60 if s < 9 else 12) for s in range(1, 10)}


def test_one_is_parked_when_more_sequences_wait_for_a_block_than_blocks_are_about_to_be_freed():
    device = PerfectDevice(a_schedule(device_slots=20, host_slots=60, streamed_limit=40))
    for _ in range(4):
        device.submit(12, 30)
    schedule, residency = device.schedule, device.schedule.residency
    while not residency.coming_device:
        device.step()
    assert not schedule.parked and len(schedule.running) == 4
    schedule.starved_plans = PATIENCE_PLANS + 1
    schedule.num_starved = residency.free_device + residency.coming_device
    preempt(schedule)
    assert not schedule.parked  # each of them gets one in a moment
    newest = schedule.running[-1]
    schedule.num_starved += 1
    preempt(schedule)
    assert schedule.parked == [newest]
    device.run()
    assert device.outputs == {s: expected(s, 12, 30) for s in (1, 2, 3, 4)}


def test_a_lowered_limit_is_respected_also_where_sequences_wait_for_slots_that_are_coming():
    device = PerfectDevice(a_schedule(device_slots=10, host_slots=60, streamed_limit=20))
    for _ in range(4):
        device.submit(12, 30)
    schedule = device.schedule
    while not (schedule.residency.num_streamed >= 6 and schedule.residency.coming_device):
        device.step()
    schedule.streamed_limit = 0
    schedule.num_starved, schedule.starved_plans = 1, PATIENCE_PLANS + 1
    parked, streamed = len(schedule.parked), schedule.residency.num_streamed
    preempt(schedule)
    assert len(schedule.parked) == parked + 1
    assert schedule.residency.num_streamed < streamed
    device.run()
    assert device.outputs == {s: expected(s, 12, 30) for s in (1, 2, 3, 4)}


@pytest.mark.parametrize("times", [4, 8])
def test_a_sequence_alone_may_be_many_times_larger_than_the_device(times: int):
    slots = 5
    device = PerfectDevice(a_schedule(device_slots=slots, host_slots=60, streamed_limit=0))
    total = times * slots * 4 - 8
    device.submit(total // 2, total - total // 2)
    most = 0
    while not device.is_quiet:
        device.step()
        most = max(most, device.schedule.residency.num_streamed)
    assert device.outputs[1] == expected(1, total // 2, total - total // 2)
    assert most >= (times - 1) * slots - 3
    counts = device.schedule.counts
    assert (counts.preemptions_parked, counts.preemptions_recomputed) == (0, 0)


def test_streamed_blocks_come_home_when_there_is_room_again():
    device = PerfectDevice(a_schedule(device_slots=10, host_slots=60, streamed_limit=20))
    device.submit(8, 60)
    short = [device.submit(8, 8)[0] for _ in range(3)]
    while not all(s in device.ended for s in short):
        device.step()
    device.run()
    assert device.schedule.counts.promotions > 0
    assert device.outputs[1] == expected(1, 8, 60)


def test_nothing_moves_while_everything_fits():
    device = PerfectDevice(a_schedule(device_slots=64, host_slots=60, streamed_limit=60))
    for _ in range(4):
        device.submit(12, 20)
    device.run()
    assert not any(plan.swap_out or plan.swap_in or plan.runs for plan in device.plans)
    assert all(launched.wanted_blocks == 0 for launched in device.launched)


def test_what_is_wanted_counts_waiting_parked_and_streamed_blocks():
    device = PerfectDevice(a_schedule(device_slots=8, host_slots=60, streamed_limit=0))
    for _ in range(4):
        device.submit(16, 8)
    device.step()
    wanted = device.launched[0].wanted_blocks
    assert wanted >= 4 * 4 - 8
    device.run()
    assert device.launched[-1].wanted_blocks == 0


def test_finishing_a_parked_sequence_returns_its_pooled_blocks():
    device = PerfectDevice(a_schedule())
    device.submit(6, 30)
    new = device.submit(9, 30)[0]
    settled(device, 2)
    park(device, new)
    seq = device.schedule.sequences[new]
    device.cancel(new)  # while its blocks are being copied
    assert seq.state is State.FINISHED
    device.finish_swap_out()
    assert device.schedule.residency.host.num_used == 0
    device.run()
    assert_all_returned(device.schedule)
