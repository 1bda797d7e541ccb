"""What messages do to sequences: states, ends, counts, shared prompts."""

from __future__ import annotations

import pytest

from pie_async.core.growth import GROWTH_PER_END, GROWTH_PER_PARKING, LEAST_GROWTH_BLOCKS
from pie_async.core.sequence import LEGAL_MOVES, Sequence, State
from pie_async.ids import SequenceId
from pie_async.messages import PoolGrown
from pie_async.sampling_params import SamplingParams
from tests.support.perfect_device import (
    BLOCK_TOKENS,
    PerfectDevice,
    a_schedule,
    assert_all_returned,
    token_at,
)

EOS = 7


def a_device(**options) -> PerfectDevice:
    return PerfectDevice(a_schedule(**options))


def ends(device: PerfectDevice) -> list[tuple[int, str | None, int | None]]:
    """(sequence, finish reason, stop token) of every advance that ended a sequence."""
    return [
        (a.sequence, a.finish_reason, a.stop_token)
        for a in device.advances
        if a.finish_reason is not None
    ]


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_only_legal_moves_between_states_are_possible(state: State):
    for target in State:
        seq = Sequence(
            id=SequenceId(1),
            request=1,
            prompt_len=1,
            tokens=[1],
            sampling=SamplingParams(),
            seed=0,
            max_tokens=1,
            order=(0, 0),
            state=state,
        )
        if target in LEGAL_MOVES[state]:
            seq.move_to(target)
            assert seq.state is target
        else:
            with pytest.raises(AssertionError):
                seq.move_to(target)


def test_every_state_can_end_and_the_end_is_final():
    assert all(State.FINISHED in LEGAL_MOVES[s] for s in State if s is not State.FINISHED)
    assert not LEGAL_MOVES[State.FINISHED]


# --- ends -----------------------------------------------------------------------------------------


def test_a_sequence_ends_at_its_length_with_exactly_that_many_tokens():
    device = a_device()
    (sequence,) = device.submit(6, 5)
    device.run()
    assert device.outputs[sequence] == [token_at(sequence, 6 + i) for i in range(5)]
    assert ends(device) == [(sequence, "length", None)]
    assert_all_returned(device.schedule)


def test_output_that_a_sequence_brings_counts_and_is_not_sampled_again():
    """Another engine had computed it."""
    device = a_device(eos_ids=(EOS,))
    had = (5, 5, 6)
    options = {"output_tokens": had, "min_tokens": 5, "frequency_penalty": 0.5}
    (sequence,) = device.submit(6, 7, **options)
    plan = device.plan()
    assert plan.rows[0].tokens[-3:] == had
    assert plan.bindings[0].prompt_len == 6
    assert plan.bindings[0].history[6:] == had
    device.settle({sequence: EOS})  # the fourth of at least five
    device.run()
    assert device.outputs[sequence] == [EOS, *[token_at(sequence, 10 + i) for i in range(3)]]
    assert ends(device) == [(sequence, "length", None)]
    assert not any(advance.first for advance in device.advances)
    assert_all_returned(device.schedule)


def test_the_models_end_of_sequence_ends_it_without_a_stop_token():
    device = a_device(eos_ids=(EOS,))
    (sequence,) = device.submit(6, 50)
    device.step()
    device.settle({sequence: EOS})
    assert ends(device) == [(sequence, "stop", None)]
    device.run()
    assert device.outputs[sequence][-1] == EOS
    assert_all_returned(device.schedule)


def test_a_stop_token_ends_it_and_is_named():
    device = a_device(eos_ids=(EOS,))
    (sequence,) = device.submit(6, 50, stop_token_ids=(33,))
    device.step()
    device.settle({sequence: 33})
    assert ends(device) == [(sequence, "stop", 33)]


def test_end_of_sequence_can_be_ignored_but_a_stop_token_cannot():
    device = a_device(eos_ids=(EOS,))
    (sequence,) = device.submit(6, 50, ignore_eos=True, stop_token_ids=(33,))
    device.plan()
    device.settle({sequence: EOS})
    device.plan()
    assert ends(device) == []
    device.settle({sequence: 33})
    assert ends(device) == [(sequence, "stop", 33)]


def test_before_min_tokens_neither_ends_it():
    device = a_device(eos_ids=(EOS,))
    (sequence,) = device.submit(6, 50, min_tokens=3, stop_token_ids=(33,))
    for token in (EOS, 33):
        device.plan()
        device.settle({sequence: token})
    assert ends(device) == []
    device.plan()
    device.settle({sequence: EOS})
    assert ends(device) == [(sequence, "stop", None)]


def test_a_stop_with_the_last_token_counts_as_stop_not_length():
    device = a_device(eos_ids=(EOS,))
    (sequence,) = device.submit(6, 1)
    device.plan()
    device.settle({sequence: EOS})
    assert ends(device) == [(sequence, "stop", None)]


def test_tokens_sampled_past_the_end_are_dropped():
    """Two iterations are in flight: the second one does not know that the first one stopped."""
    device = a_device(eos_ids=(EOS,))
    (sequence,) = device.submit(6, 50)
    device.plan()
    device.plan()
    device.settle({sequence: EOS})
    device.settle()
    assert device.outputs[sequence] == [EOS]
    assert_all_returned(device.schedule)


def test_cancelling_ends_it_at_once_wherever_it_is():
    device = a_device(max_running=1)
    running, waiting = device.submit(6, 50)[0], device.submit(6, 50)[0]
    device.step()
    device.cancel(waiting, running)
    assert ends(device) == [(waiting, "abort", None), (running, "abort", None)]
    device.run()
    assert_all_returned(device.schedule)
    assert device.schedule.counts.sequences_cancelled == 2


def test_cancelling_what_is_unknown_or_over_is_passed_over():
    device = a_device()
    (sequence,) = device.submit(6, 2)
    device.run()
    device.cancel(sequence, 999)
    assert ends(device) == [(sequence, "length", None)]
    assert device.schedule.counts.sequences_cancelled == 0


def test_a_stop_string_ends_it_with_reason_stop_and_is_no_cancellation():
    device = a_device()
    (sequence,) = device.submit(6, 50)
    device.step()
    (advance,) = device.schedule.cancel([SequenceId(sequence)], "stop")
    assert (advance.finish_reason, advance.token) == ("stop", None)
    assert device.schedule.counts.sequences_cancelled == 0


def test_iterations_settle_in_order_or_not_at_all():
    device = a_device()
    device.submit(6, 5)
    device.plan()
    device.plan()
    with pytest.raises(AssertionError, match="out of order"):
        device.schedule.settle(device.plans[1].iteration, ())


# --- several sequences of one prompt ----------------------------------------------------------


def test_sequences_of_one_request_share_their_full_prompt_blocks():
    device = a_device(device_slots=32)
    first, second, third = device.submit(11, 6, n=3)
    device.step()
    device.step()
    tables = [device.schedule.sequences[s].table for s in (first, second, third)]
    shared = tables[0][:2]
    assert all(table[:2] == shared for table in tables)
    tails = {table[2].id for table in tables}
    assert len(tails) == 3
    assert device.schedule.counts.cached_tokens == 2 * 8
    device.run()
    assert [device.outputs[s] for s in (first, second, third)] == [
        [token_at(s, 11 + i) for i in range(6)] for s in (first, second, third)
    ]
    assert_all_returned(device.schedule)


def test_the_prompt_is_computed_once_and_the_others_say_what_they_found():
    device = a_device(device_slots=32)
    device.submit(17, 3, n=4)
    device.run()
    counts = device.schedule.counts
    assert counts.prompt_tokens == 17 + 3 * 1
    assert counts.cached_tokens == 3 * 16
    first_tokens = {}
    for advance in device.advances:
        if advance.first is not None:
            assert advance.sequence not in first_tokens
            first_tokens[advance.sequence] = advance.first.cached_tokens
    assert sorted(first_tokens.values()) == [0, 16, 16, 16]


def test_a_first_token_says_how_long_its_sequence_waited_and_then_took():
    device = a_device(max_running=1)
    (one,) = device.submit(6, 2)
    device.plan()
    device.schedule.now_s = 2.0
    (other,) = device.submit(6, 1)
    device.schedule.now_s = 3.0
    device.settle()
    device.schedule.now_s = 5.0
    device.run()
    told = {advance.sequence: advance.first for advance in device.advances if advance.first}
    assert (told[one].queued_s, told[one].prefill_s) == (0.0, 3.0)
    assert (told[other].queued_s, told[other].prefill_s) == (3.0, 0.0)


def test_followers_wait_only_for_the_shared_part_of_the_prompt():
    device = a_device(device_slots=32, token_budget=4)
    device.submit(9, 3, n=2)
    device.step()
    assert device.schedule.num_waiting == 1
    device.run()
    assert set(device.ended.values()) == {"length"}


@pytest.mark.parametrize("stage", ["queued", "prefill"])
def test_followers_start_when_their_leader_is_cancelled(stage: str):
    device = a_device(device_slots=32, token_budget=4)
    leader, follower = device.submit(20, 3, n=2)
    if stage == "prefill":
        device.step()
    device.cancel(leader)
    device.run()
    assert device.ended == {leader: "abort", follower: "length"}
    assert_all_returned(device.schedule)


def test_a_cancelled_follower_leaves_no_trace():
    device = a_device(device_slots=32, token_budget=4)
    leader, follower = device.submit(20, 3, n=2)
    device.cancel(follower)
    assert device.schedule.num_waiting == 1
    device.run()
    assert device.ended == {follower: "abort", leader: "length"}
    assert_all_returned(device.schedule)


def test_a_short_prompt_shares_nothing_and_all_its_sequences_run():
    device = a_device()
    sequences = device.submit(3, 4, n=3)
    device.run()
    assert device.schedule.counts.cached_tokens == 0
    assert all(len(device.outputs[s]) == 4 for s in sequences)


def test_prompts_whose_logprobs_are_wanted_are_computed_not_shared():
    device = a_device(device_slots=32)
    device.submit(12, 3, n=2, prompt_logprobs=1)
    device.run()
    assert device.schedule.counts.cached_tokens == 0
    assert device.schedule.counts.prompt_tokens == 24


def test_requests_with_the_same_beginning_share_while_one_of_them_runs():
    device = a_device(device_slots=32)
    device.submit(range(40, 52), 30)
    device.step()
    device.submit([*range(40, 48), 1, 2, 3], 3)
    device.run()
    assert device.schedule.counts.cached_tokens == 8


def test_followers_of_a_prompt_that_is_found_start_with_their_leader():
    device = a_device(device_slots=32)
    device.submit(range(40, 52), 3)
    device.run()
    device.submit(range(40, 52), 3, n=3)
    assert len(device.plan().rows) == 3


# --- starting over ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_dropped_sequence_computes_what_is_not_cached_again_and_goes_on(is_shared: bool):
    device = a_device(shares_prefixes=is_shared)
    (sequence,) = device.submit(6, 20)
    device.step()
    while device.num_flying:
        device.settle()
    had = list(device.outputs[sequence])
    seq = device.schedule.sequences[sequence]
    device.schedule.park(seq)
    device.schedule.drop(seq)
    assert seq.state is State.WAITING
    assert seq.table == []
    plan = device.plan()
    assert plan.rows[0].tokens == tuple(seq.tokens)[4 * is_shared :]
    device.run()
    assert device.outputs[sequence][: len(had)] == had
    assert device.outputs[sequence] == [token_at(sequence, 6 + i) for i in range(20)]
    counts = device.schedule.counts
    assert (counts.preemptions_parked, counts.preemptions_recomputed) == (1, 1)
    assert counts.output_tokens == 20
    assert counts.cached_tokens == 0, "what it found is its own"
    assert (counts.prefix_query_tokens, counts.prefix_hit_tokens) == (6 * is_shared, 0)


def test_a_sequence_larger_than_the_device_waits_for_the_pool_to_be_pinned():
    schedule = a_schedule(device_slots=4, host_slots=0, staging_slots=20, streamed_limit=0)
    schedule.awaits_pool = True
    device = PerfectDevice(schedule)
    device.submit(30, 20)
    for _ in range(20):
        device.step()
    assert device.outputs[1] == []
    assert schedule.pool_grown(PoolGrown(slots=20, is_all=True)) == []
    device.run()
    assert len(device.outputs[1]) == 20 and device.ended[1] == "length"


def test_where_the_pool_stays_small_sequences_end_when_the_memories_are_full():
    schedule = a_schedule(device_slots=8, host_slots=4, staging_slots=20)
    schedule.awaits_pool = True
    device = PerfectDevice(schedule)
    device.submit(30, 40)
    device.submit(60, 2)
    longest = (8 + 4 - 3) * BLOCK_TOKENS
    (ended,) = schedule.pool_grown(PoolGrown(slots=4, is_all=True, longest=longest))
    assert (ended.sequence, ended.finish_reason) == (2, "abort")
    device.run()
    assert len(device.outputs[1]) == longest - 30 and device.ended[1] == "length"


def test_parking_makes_admission_leave_more_room_to_grow_and_ends_less():
    schedule = a_schedule()
    device = PerfectDevice(schedule)
    device.submit(4, 12)
    device.submit(4, 12)
    device.plan()
    assert schedule.growth_reserve == 2, "a block for each"
    parked = schedule.running[-1]
    schedule.park(parked)
    assert schedule.growth.blocks == LEAST_GROWTH_BLOCKS + GROWTH_PER_PARKING
    before = schedule.growth.blocks
    schedule.cancel([parked.id], "abort")
    assert schedule.growth.blocks == before - GROWTH_PER_END
    for _ in range(50):
        device.submit(4, 1)
    device.run()
    assert schedule.growth.blocks == LEAST_GROWTH_BLOCKS
