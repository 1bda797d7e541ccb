"""What an iteration is made of."""

from __future__ import annotations

import pytest

from pie_async.core.batching import PROMOTIONS_BESIDE_STAGING
from pie_async.messages import CopyRun
from pie_async.sampling_params import SamplingParams
from tests.support.perfect_device import (
    BLOCK_TOKENS,
    FIRST_STAGING_SLOT,
    PerfectDevice,
    a_schedule,
)


def a_device(**options) -> PerfectDevice:
    return PerfectDevice(a_schedule(**{"device_slots": 64, **options}))


def rows(plan) -> list[tuple[int, int, int]]:
    """(sequence, tokens, sampled?) of each row."""
    return [(row.sequence, row.num_tokens, int(row.is_sampled)) for row in plan.rows]


# --- the token budget -------------------------------------------------------------------------


def test_a_long_prompt_is_fed_in_chunks_and_sampled_after_the_last_one():
    device = a_device(token_budget=8)
    device.submit(19, 2)
    plans = [device.plan() for _ in range(3)]
    assert [rows(plan) for plan in plans] == [[(1, 8, 0)], [(1, 8, 0)], [(1, 3, 1)]]
    assert [plan.rows[0].start for plan in plans] == [0, 8, 16]
    fed = [token for plan in plans for token in plan.rows[0].tokens]
    assert fed == device.schedule.sequences[1].tokens


def test_decoding_comes_before_prompts_and_takes_its_share_of_the_budget():
    device = a_device(token_budget=8)
    device.submit(4, 20)
    device.plan()
    device.submit(30, 2)
    assert rows(device.plan()) == [(1, 1, 1), (2, 7, 0)]


def test_prompts_under_way_come_before_new_ones():
    device = a_device(token_budget=8)
    device.submit(12, 4)
    device.submit(12, 4)
    assert rows(device.plan()) == [(1, 8, 0)]
    assert rows(device.plan()) == [(1, 4, 1), (2, 4, 0)]


@pytest.mark.parametrize("budget", [1, 3, 8])
def test_no_iteration_exceeds_the_budget(budget: int):
    device = a_device(token_budget=budget)
    for length in (1, 9, 17, 4):
        device.submit(length, 5)
    device.run()
    fed = [sum(row.num_tokens for row in plan.rows) for plan in device.plans]
    assert max(fed) == budget
    assert all(len(device.outputs[s]) == 5 for s in (1, 2, 3, 4))


def test_several_prompts_share_one_iteration():
    device = a_device(token_budget=64)
    for _ in range(3):
        device.submit(5, 2)
    assert rows(device.plan()) == [(1, 5, 1), (2, 5, 1), (3, 5, 1)]


# --- order and admission ------------------------------------------------------------------------


def test_requests_start_in_the_order_of_their_arrival():
    device = a_device(max_running=1)
    for _ in range(3):
        device.submit(5, 2)
    device.run()
    assert list(device.ended) == [1, 2, 3]


def test_a_lower_priority_number_starts_first():
    device = a_device(max_running=1)
    for priority in (1, 0, 0, -1):
        device.submit(5, 2, priority=priority)
    device.run()
    assert list(device.ended) == [4, 2, 3, 1]


def test_no_more_run_than_there_are_lanes():
    device = a_device(max_running=2)
    for _ in range(5):
        device.submit(5, 4)
    lanes = set()
    while not device.is_quiet:
        device.step()
        assert len(device.schedule.running) <= 2
        lanes |= {row.lane for plan in device.plans for row in plan.rows}
    assert lanes == {0, 1}


def test_a_request_waits_until_its_tokens_fit_beside_what_runs():
    device = a_device(device_slots=8)
    device.submit(16, 9)
    device.submit(20, 4)
    assert rows(device.plan()) == [(1, 16, 1)]
    assert device.schedule.num_waiting == 1
    device.run()
    assert device.schedule.counts.preemptions_parked == 0


def test_prompts_admitted_together_do_not_promise_the_same_room_twice():
    device = a_device(device_slots=8, token_budget=4)
    for _ in range(3):
        device.submit(14, 2)
    device.plan()
    assert len(device.schedule.running) <= 2
    device.run()
    assert device.schedule.counts.preemptions_parked == 0


def test_later_requests_do_not_overtake_one_that_does_not_fit_yet():
    device = a_device(device_slots=8)
    device.submit(16, 9)
    device.submit(24, 2)
    device.submit(1, 1)
    device.run()
    started = dict.fromkeys(row.sequence for plan in device.plans for row in plan.rows)
    assert list(started) == [1, 2, 3]


def test_nobody_new_overtakes_a_parked_sequence():
    device = a_device(device_slots=6, host_slots=20)
    device.submit(4, 25)
    device.submit(4, 25)
    while not device.schedule.parked:
        device.step()
    late = device.submit(1, 1)[0]
    while device.schedule.parked:
        assert late not in {seq.id for seq in device.schedule.running}
        device.step()
    device.run()
    assert set(device.ended.values()) == {"length"}


# --- what the device is told ------------------------------------------------------------------


def test_a_token_still_on_the_device_is_fed_back_without_its_id():
    device = a_device()
    device.submit(5, 4)
    first, second = device.plan(), device.plan()
    assert second.rows[0].tokens == ()
    assert second.rows[0].start == 5
    assert first.rows[0].tokens != ()


def test_a_token_the_host_knows_is_fed_with_its_id():
    device = a_device()
    device.submit(5, 4)
    device.plan()
    device.settle({1: 55})
    assert device.plan().rows[0].tokens == (55,)


def test_no_row_is_launched_beyond_the_last_wanted_token():
    device = a_device()
    device.submit(5, 2)
    assert [rows(device.plan()) for _ in range(3)] == [[(1, 5, 1)], [(1, 1, 1)], []]


def test_a_lane_is_bound_once_and_again_after_parking():
    device = a_device()
    device.submit(5, 9, repetition_penalty=1.5, stop_token_ids=(33,))
    binding = device.plan().bindings[0]
    seq = device.schedule.sequences[1]
    assert (binding.sequence, binding.prompt_len, binding.seed) == (1, 5, seq.seed)
    assert binding.history == tuple(seq.tokens)
    assert binding.stop_ids == (33,)
    device.settle()
    assert device.plan().bindings == []
    device.settle()
    device.schedule.park(seq)
    again = device.plan().bindings[0]
    assert again.history == tuple(seq.tokens)
    assert again.prompt_len == 5


def test_stop_ids_name_the_models_own_ends_unless_they_are_ignored():
    device = a_device(eos_ids=(2, 1))
    device.submit(5, 2, stop_token_ids=(33,))
    device.submit(5, 2, ignore_eos=True)
    assert [b.stop_ids for b in device.plan().bindings] == [(1, 2, 33), ()]


def test_history_is_sent_only_to_lanes_that_count_tokens():
    device = a_device()
    device.submit(5, 2)
    assert device.plan().bindings[0].history == ()
    assert not SamplingParams().counts_tokens


def test_a_table_is_sent_whole_at_first_and_then_only_where_it_changed():
    device = a_device()
    device.submit(7, 12)
    updates = [[(u.first, len(u.slots)) for u in device.plan().tables] for _ in range(7)]
    assert updates == [[(0, 2)], [], [(2, 1)], [], [], [], [(3, 1)]]


def test_a_block_that_moved_is_sent_again_with_all_behind_it():
    device = a_device(host_slots=8, streamed_limit=8)
    device.submit(13, 12)
    device.plan()
    device.settle()
    seq = device.schedule.sequences[1]
    block = seq.table[1]
    move = device.schedule.residency.demote(block, is_streamed=True)
    device.swap_outs.append([move])
    assert device.plan().tables == []  # it stays readable where it is until it is copied
    device.finish_swap_out()
    (update,) = device.plan().tables
    assert update.first == 1
    assert update.slots[0] == block.staging_slot == FIRST_STAGING_SLOT
    assert list(update.slots[1:]) == [b.device_slot for b in seq.table[2:]]


# --- staging ----------------------------------------------------------------------------------


def streamed(count: int, host_slots: int = 8):
    """A map with that many streamed blocks and their owner."""
    device = a_device(host_slots=host_slots, streamed_limit=host_slots)
    device.submit(count * BLOCK_TOKENS + 1, 9)
    device.plan()
    device.settle()
    seq = device.schedule.sequences[1]
    return device, device.schedule.residency, seq.table[:count]


def demote(device: PerfectDevice, blocks) -> None:
    residency = device.schedule.residency
    device.swap_outs.append([residency.demote(block, is_streamed=True) for block in blocks])
    device.finish_swap_out()


def test_neighbouring_blocks_are_staged_by_one_copy():
    device, residency, blocks = streamed(4)
    demote(device, blocks)
    assert residency.staged.now().runs() == [CopyRun(0, FIRST_STAGING_SLOT, 4)]


def test_what_only_waits_in_the_pool_leaves_no_gap_between_streamed_blocks():
    device, residency, blocks = streamed(4)
    device.submit(9, 9)
    device.plan()
    device.settle()
    other = device.schedule.sequences[2]
    device.schedule.park(other)
    demote(device, blocks[:2])
    device.swap_outs.append([residency.demote(other.table[0], is_streamed=False)])
    device.finish_swap_out()
    demote(device, blocks[2:])
    assert residency.staged.now().runs() == [CopyRun(0, FIRST_STAGING_SLOT, 4)]


def test_a_gap_starts_a_new_copy_and_is_filled_by_what_leaves_next():
    device, residency, blocks = streamed(4)
    demote(device, blocks[:3])
    device.swap_ins.append([residency.begin_promote(blocks[1])])
    device.finish_swap_in()
    assert residency.staged.now().runs() == [
        CopyRun(0, FIRST_STAGING_SLOT, 1),
        CopyRun(2, FIRST_STAGING_SLOT + 2, 1),
    ]
    demote(device, [blocks[3]])
    assert residency.staged.now().runs()[-1] == CopyRun(2, FIRST_STAGING_SLOT + 2, 2)
    # Its clean copy lies where it lay, and so does its staging slot.
    assert residency.demote(blocks[1], is_streamed=True) is None
    assert residency.staged.now().runs() == [CopyRun(0, FIRST_STAGING_SLOT, 4)]


def test_a_block_on_its_way_out_is_not_staged_before_its_copy_is_complete():
    device, residency, blocks = streamed(2)
    device.swap_outs.append([residency.demote(b, is_streamed=True) for b in blocks])
    assert residency.staged.now().runs() == []
    assert device.plan().runs == []
    device.finish_swap_out()
    plan = device.plan()
    assert sum(run.count for run in plan.runs) == 2
    assert device.schedule.in_flight[-1].is_staged


def test_what_an_iteration_was_made_of_is_remembered_until_it_settles():
    device = a_device(token_budget=8)
    device.submit(4, 9)
    device.plan()
    device.submit(30, 2)
    device.plan()
    launched = device.schedule.in_flight[-1]
    assert (launched.decode_rows, launched.prefill_tokens) == (1, 7)
    assert launched.iteration == 2


def test_beside_staged_blocks_others_come_home_a_few_at_a_time():
    device = PerfectDevice(a_schedule(device_slots=40, host_slots=60, streamed_limit=40))
    device.submit(80, 40)
    device.submit(60, 100)
    device.run()
    home = [len(plan.swap_in) for plan in device.plans if plan.rows and plan.runs]
    assert max(home) == PROMOTIONS_BESIDE_STAGING
    assert device.schedule.counts.promotions > PROMOTIONS_BESIDE_STAGING


def test_copies_that_wait_for_their_turn_are_made_when_nothing_runs_any_more():
    device, residency, blocks = streamed(4)
    demote(device, blocks)
    device.schedule.promotions.append(residency.begin_promote(blocks[0]))
    device.schedule.cancel([1], "abort")
    assert not device.schedule.is_idle
    plan = device.plan()
    assert [move.block for move in plan.swap_in] == [blocks[0].id]
    device.finish_swap_in()
    assert (device.schedule.is_idle, residency.used_device) == (True, 0)
