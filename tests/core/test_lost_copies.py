"""What the schedule makes of copies that went wrong for good: who starts over, and who does not."""

from __future__ import annotations

import pytest

from pie_async.core import invariants
from pie_async.core.lost_copies import MOST_FAILURES_IN_A_ROW, Patience
from pie_async.core.schedule import MOST_LOSSES
from pie_async.errors import DeviceFault
from pie_async.ids import HostSlot
from tests.support.perfect_device import PerfectDevice, a_schedule, assert_all_returned, token_at


def a_streaming_device(**memory) -> tuple[PerfectDevice, list[int]]:
    """One sequence whose prompt is larger than the device, with some of it streamed, and a short
    one beside it."""
    schedule = a_schedule(device_slots=8, host_slots=16, streamed_limit=8, **memory)
    device = PerfectDevice(schedule)
    (long,) = device.submit(40, 12)
    for _ in range(20):
        device.step()
        if device.plans[-1].runs:
            break
    assert device.plans[-1].runs
    (short,) = device.submit(2, 3)
    return device, [long, short]


def tokens_of(device: PerfectDevice, sequence: int, prompt_len: int, count: int) -> bool:
    expected = [token_at(sequence, prompt_len + i) for i in range(count)]
    return device.outputs[sequence] == expected


def test_a_demotion_that_failed_leaves_the_block_where_it_was_and_is_tried_again():
    schedule = a_schedule(device_slots=8, host_slots=16, streamed_limit=8)
    device = PerfectDevice(schedule)
    device.submit(40, 12)
    while not device.swap_outs:
        device.plan_ahead()
        if device.num_flying and not device.swap_outs:
            device.settle()
    moves = list(device.swap_outs[0])
    device.finish_swap_out(failed=len(moves))
    for move in moves:
        block = schedule.residency.blocks[move.block]
        assert (block.device_slot, block.host_slot, block.move) == (move.device_slot, None, None)
        assert not block.is_streamed
    assert schedule.counts.copies_lost == len(moves)
    device.run()
    assert device.ended == {1: "length"}
    assert schedule.counts.sequences_begun_anew == 0
    assert_all_returned(schedule)


def test_who_read_what_was_not_staged_starts_over_and_the_others_go_on():
    device, (long, short) = a_streaming_device()
    while not device.plans[-1].runs or device.num_flying < 2:
        device.step()
        device.plan_ahead()
    told = len(device.outputs[long])
    device.settle(unstaged=1)
    assert len(device.outputs[long]) == told
    assert device.schedule.damaged == {long}
    invariants.check(device.schedule)
    device.schedule.sequences[long].launches_in_flight = 0
    with pytest.raises(invariants.InvariantBroken, match=f"damaged sequence {long} waits for no"):
        invariants.check(device.schedule)
    device.schedule.sequences[long].launches_in_flight = 1
    device.run()
    assert device.ended == {long: "length", short: "length"}
    assert tokens_of(device, long, 40, 12)
    assert tokens_of(device, short, 2, 3)
    counts = device.schedule.counts
    assert (counts.sequences_begun_anew, counts.sequences_lost) == (1, 0)
    assert counts.preemptions_recomputed == 0
    assert_all_returned(device.schedule)


def test_a_sequence_cancelled_while_its_worthless_iterations_run_is_gone():
    device, (long, _) = a_streaming_device()
    while not device.plans[-1].runs or device.num_flying < 2:
        device.step()
        device.plan_ahead()
    device.settle(unstaged=1)
    device.cancel(long)
    assert not device.schedule.damaged
    device.run()
    assert device.ended[long] == "abort"
    assert_all_returned(device.schedule)


def test_a_sequence_that_loses_its_kv_again_and_again_ends_and_says_why():
    device, (long, short) = a_streaming_device()
    for _ in range(2000):
        if long in device.ended:
            break
        device.plan_ahead()
        if device.swap_outs:
            device.finish_swap_out()
        elif device.swap_ins:
            device.finish_swap_in()
        else:
            device.settle(unstaged=100)
    device.run()
    assert device.ended == {long: "abort", short: "length"}
    (last,) = [advance for advance in device.advances if advance.lost_because is not None]
    assert last.sequence == long
    assert f"lost {MOST_LOSSES + 1} times" in last.lost_because
    assert device.schedule.counts.sequences_lost == 1
    assert_all_returned(device.schedule)


def test_only_failures_in_a_row_exhaust_the_patience():
    patience = Patience("to the pool")
    for _ in range(3):
        for _ in range(MOST_FAILURES_IN_A_ROW - 1):
            patience.take((HostSlot(1),))
        patience.take(())
    for _ in range(MOST_FAILURES_IN_A_ROW - 1):
        patience.take((HostSlot(1),))
    with pytest.raises(DeviceFault, match="16 copies to the pool in a row failed"):
        patience.take((HostSlot(1),))
