"""Cached blocks: kept while nobody wants their slots, found by content, the oldest go first."""

from __future__ import annotations

import random

import pytest

from pie_async.core import invariants
from pie_async.core.pressure import room, wanted_streamed
from tests.support.perfect_device import (
    BLOCK_TOKENS,
    PerfectDevice,
    a_schedule,
    assert_all_returned,
    token_at,
)


def a_device(**options) -> PerfectDevice:
    return PerfectDevice(a_schedule(**options))


def ran(device: PerfectDevice, prompt, max_tokens: int = 1, **options) -> int:
    """Run one request to its end; how many of its tokens were found."""
    before = device.schedule.counts.cached_tokens
    device.submit(prompt, max_tokens, **options)
    device.run()
    invariants.check(device.schedule)
    return device.schedule.counts.cached_tokens - before


def cached(device: PerfectDevice) -> int:
    return len(device.schedule.residency.cache)


# --- kept and found ---------------------------------------------------------------------------


def test_blocks_outlive_their_sequence_and_are_found_by_the_next():
    device = a_device()
    assert ran(device, range(40, 52)) == 0
    assert cached(device) == 3
    assert ran(device, range(40, 52)) == 8, "the last token is always computed"
    assert ran(device, [*range(40, 52), 1]) == 12
    assert ran(device, [*range(40, 47), 1, 2, 3]) == 4
    assert_all_returned(device.schedule)


def test_the_next_turn_of_a_conversation_finds_prompt_and_output():
    device = a_device(device_slots=32)
    (sequence,) = device.submit(range(40, 50), 11)
    device.run()
    history = [*range(40, 50), *device.outputs[sequence]]
    assert ran(device, [*history, 1, 2, 3]) == 20, "20 of the 21 tokens have KV"


def test_a_cancelled_sequence_leaves_what_it_computed():
    device = a_device(token_budget=8)
    (sequence,) = device.submit(range(40, 60), 5)
    device.plan()
    device.settle()
    device.plan()
    device.cancel(sequence)
    device.run()
    assert ran(device, range(40, 60)) == 8, "the second chunk had not settled"


def test_the_reader_of_prompt_logprobs_computes_but_others_find_its_blocks():
    device = a_device()
    assert ran(device, range(40, 52), prompt_logprobs=1) == 0
    assert ran(device, range(40, 52), prompt_logprobs=1) == 0
    assert ran(device, range(40, 52)) == 8


def test_switched_off_nothing_is_shared_or_kept():
    device = a_device(shares_prefixes=False)
    for n in (1, 1, 3):
        assert ran(device, range(40, 52), 5, n=n) == 0
        assert device.schedule.residency.device.num_used == 0
    assert device.schedule.counts.prefix_query_tokens == 0


def test_different_salts_never_share():
    device = a_device(device_slots=64)
    for salt in (None, "a", "b"):
        assert ran(device, range(40, 52), cache_salt=salt) == 0
    for salt in (None, "a", "b"):
        assert ran(device, range(40, 52), cache_salt=salt) == 8


def test_queries_and_hits_are_counted():
    device = a_device()
    for _ in range(2):
        ran(device, range(40, 52))
    counts = device.schedule.counts
    assert (counts.prefix_query_tokens, counts.prefix_hit_tokens) == (24, 8)


def test_of_two_blocks_with_the_same_content_one_is_kept():
    device = a_device()
    first, second = device.submit(range(40, 52), 4)[0], device.submit(range(40, 52), 9)[0]
    device.run()
    assert {len(device.outputs[s]) for s in (first, second)} == {4, 9}
    assert cached(device) == 3 + 2, "the prompt once, and the second one's outputs"


def test_a_twin_takes_the_place_of_a_block_that_was_evicted():
    device = a_device(device_slots=8, host_slots=0)
    short, long = device.submit(range(40, 48), 1)[0], device.submit(range(40, 48), 20)[0]
    device.run()
    assert device.ended == {short: "length", long: "length"}
    assert device.schedule.residency.cache.evictions > 0
    assert ran(device, [*range(40, 48), 1]) == 8


# --- evicted ----------------------------------------------------------------------------------


def test_cached_blocks_give_way_the_least_recently_used_first():
    device = a_device(device_slots=8)
    for start in (40, 60, 40):
        ran(device, range(start, start + 9))
    ran(device, 17)  # takes the free slots and one more
    assert device.schedule.residency.cache.evictions > 0
    assert ran(device, range(40, 49)) == 8
    assert ran(device, range(60, 69)) < 8


def test_of_one_chain_the_tail_goes_before_its_head():
    device = a_device(device_slots=8)
    ran(device, range(40, 61))
    cache, hasher = device.schedule.residency.cache, device.schedule.sharing.hasher
    digests = [hasher.root(None)]
    for index in range(5):
        digests.append(hasher.digest(digests[-1], list(range(40, 61)), index))
    for num_left in (4, 3, 2, 1, 0):
        cache.evict()
        is_found = [cache.find(digest) is not None for digest in digests[1:]]
        assert is_found == [index < num_left for index in range(5)]


def test_evictions_take_no_slot_that_an_iteration_still_reads():
    device = a_device(device_slots=4, host_slots=0)
    (sequence,) = device.submit(range(40, 52), 9)
    device.plan()
    device.settle()
    device.plan_ahead()
    device.cancel(sequence)
    residency = device.schedule.residency
    assert (residency.cache.num_cooling, residency.cache.num_evictable) == (3, 0)
    assert residency.allocate(0) is None
    assert (residency.free_device, residency.coming_device) == (0, 4)
    device.settle()
    device.settle()
    assert (residency.cache.num_cooling, residency.free_device) == (0, 4)


def test_a_block_that_is_still_read_can_be_adopted():
    device = a_device()
    (sequence,) = device.submit(range(40, 52), 9)
    device.plan()
    device.settle()
    device.plan()
    device.cancel(sequence)
    device.submit(range(40, 52), 3)
    assert device.plan().rows[0].start == 8
    device.run()
    assert_all_returned(device.schedule)


def test_content_that_a_twin_was_read_from_is_recently_used():
    device = a_device(device_slots=12)
    short, _ = device.submit(range(40, 48), 1)[0], device.submit(range(40, 48), 9)[0]
    while short not in device.ended:
        device.step()
    ran(device, range(60, 68))
    device.run()
    cache, hasher = device.schedule.residency.cache, device.schedule.sharing.hasher
    root = hasher.root(None)
    heads = [hasher.digest(root, list(range(start, start + 4)), 0) for start in (40, 60)]
    order = [block.digest for block, _ in cache.cached() if block.digest in heads]
    assert order == heads[::-1]


# --- computed once -----------------------------------------------------------------------------


def computed(device: PerfectDevice) -> int:
    """Prompt tokens so far."""
    return device.schedule.counts.prompt_tokens


def test_prompts_that_come_together_and_begin_alike_are_computed_once():
    device = a_device(device_slots=64)
    device.schedule.sharing.worth_awaiting_tokens = 8
    for tail in range(5):
        device.submit([*range(40, 60), tail], 3)
    assert [row.num_tokens for row in device.plan().rows] == [21]
    assert len(device.plan().rows) == 1, "its blocks are found when the iteration is over"
    device.settle()
    assert [row.num_tokens for row in device.plan().rows] == [1] * 5
    device.run()
    assert computed(device) == 21 + 4
    assert len({len(out) for out in device.outputs.values()}) == 1


@pytest.mark.parametrize(
    ("other", "options"),
    [
        ([*range(40, 47), *range(1, 15)], {}),  # begins alike, but not for long enough
        (range(70, 90), {}),
        (range(40, 47), {}),
        (range(40, 60), {"cache_salt": "a"}),
        (range(40, 60), {"prompt_logprobs": 0}),
    ],
)
def test_what_could_not_share_enough_does_not_wait(other, options: dict):
    device = a_device(device_slots=64)
    device.schedule.sharing.worth_awaiting_tokens = 8
    device.submit(range(40, 60), 3)
    device.submit(other, 3, **options)
    assert [row.num_tokens for row in device.plan().rows] == [20, len(list(other))]
    device.run()


def test_who_waits_for_a_prefix_computes_it_if_the_other_goes_away():
    device = a_device(device_slots=64, token_budget=8)
    device.schedule.sharing.worth_awaiting_tokens = 8
    first, second = (device.submit(range(40, 64), 3)[0] for _ in range(2))
    assert [row.sequence for row in device.plan().rows] == [first]
    device.cancel(first)
    assert [row.sequence for row in device.plan().rows] == [second]
    device.run()
    assert device.ended == {first: "abort", second: "length"}
    assert_all_returned(device.schedule)


def test_blocks_that_others_use_already_take_no_room_at_admission():
    device = a_device(device_slots=16, host_slots=0)
    device.submit([*range(40, 80), 1], 3)
    device.plan()
    device.settle()
    for tail in (2, 3):
        device.submit([*range(40, 80), tail], 3)
    assert [row.num_tokens for row in device.plan().rows] == [1, 1, 1], (
        "of 3 x 11 blocks 10 are one"
    )
    device.submit([*range(1, 40)], 3)
    assert len(device.plan().rows) == 3, "nobody else's blocks are this one's"
    device.run()
    assert set(device.ended.values()) == {"length"}


# --- free for everyone else ---------------------------------------------------------------------


def test_cached_blocks_count_as_free():
    device = a_device(device_slots=16)
    before = room(device.schedule)
    ran(device, range(40, 90))
    assert cached(device) == 12
    assert room(device.schedule) == before
    assert device.schedule.residency.used_device == wanted_streamed(device.schedule) == 0


@pytest.mark.parametrize("host_slots", [0, 16])
def test_a_cache_that_fills_the_device_changes_no_decision(host_slots: int):
    """Other prompts on a device full of cached blocks: the plans of an empty one."""

    def positions(*, is_full: bool) -> list:
        schedule = a_schedule(device_slots=12, host_slots=host_slots, streamed_limit=8)
        device = PerfectDevice(schedule)
        if is_full:
            for start in range(1, 9):
                ran(device, [start] * 9)
            assert device.schedule.residency.device.num_free <= 1
        device.plans.clear()
        for number in range(5):
            device.submit([100 + number] * (5 + 3 * number), 4 + 3 * number)
        device.run()
        return [
            (
                [(row.start, row.num_tokens) for row in plan.rows],
                len(plan.swap_out),
                len(plan.swap_in),
                sum(run.count for run in plan.runs),
            )
            for plan in device.plans
        ]

    assert positions(is_full=True) == positions(is_full=False)


def test_a_pooled_copy_is_given_back_when_the_block_becomes_cached():
    device = a_device(device_slots=8, streamed_limit=8)
    (sequence,) = device.submit(range(40, 60), 9)
    device.plan()
    device.settle()
    schedule, residency = device.schedule, device.schedule.residency
    block = schedule.sequences[sequence].table[0]
    device.swap_outs.append([residency.demote(block, is_streamed=True)])
    device.finish_swap_out()
    device.swap_ins.append([residency.begin_promote(block)])
    device.finish_swap_in()
    assert block.is_clean
    device.cancel(sequence)
    assert block in residency.cache
    assert residency.host.num_used == residency.staging.num_used == 0


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_block_let_go_while_it_is_copied_is_cached_when_the_copy_ends(direction: str):
    device = a_device(device_slots=8, streamed_limit=8)
    (sequence,) = device.submit(range(40, 60), 9)
    device.plan()
    device.settle()
    schedule, residency = device.schedule, device.schedule.residency
    block = schedule.sequences[sequence].table[0]
    device.swap_outs.append([residency.demote(block, is_streamed=True)])
    if direction == "in":
        device.finish_swap_out()
        device.swap_ins.append([residency.begin_promote(block)])
    device.cancel(sequence)
    assert block not in residency.cache
    device.run()
    assert block in residency.cache
    assert ran(device, range(40, 60)) == 16


# --- whatever happens -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_give_the_same_outputs_with_and_without(seed: int):
    """Conversations that go on, begin alike, are cancelled; small memories; several tenants."""
    (tokens, found), (others, none) = (_history(seed, is_shared=on) for on in (True, False))
    assert tokens == others
    assert none == 0
    assert found > 0


def _history(seed: int, *, is_shared: bool) -> tuple[list[list[int]], int]:
    """Outputs of all finished turns, and how many tokens were found."""
    dice = random.Random(seed)
    device_slots, host_slots = dice.choice([(10, 0), (10, 6), (24, 0), (24, 30)])
    schedule = a_schedule(
        device_slots=device_slots,
        host_slots=host_slots,
        streamed_limit=dice.choice([0, 4]),
        token_budget=dice.choice([6, 64]),
        shares_prefixes=is_shared,
    )
    schedule.sharing.worth_awaiting_tokens = dice.choice([1, 8, 1000])
    device = PerfectDevice(schedule)
    longest = (device_slots + host_slots - 3) * BLOCK_TOKENS
    talks = [[dice.randrange(2)] * 9 for _ in range(6)]
    outputs = []
    for turn in range(12):
        batch = {}
        for talk in dice.sample(talks, 3):
            talk += [1000 + turn] * dice.randrange(1, 6)
            max_tokens = dice.randrange(1, 12)
            if len(talk) + max_tokens > longest:
                del talk[9:]
            salt = dice.choice([None, "a"])
            (sequence,) = device.submit(talk, max_tokens, cache_salt=salt)
            batch[sequence] = (talk, len(talk), dice.random() < 0.2)
            for _ in range(dice.randrange(4)):
                device.step()
        for sequence, (_, _, is_cancelled) in batch.items():
            if is_cancelled:
                device.cancel(sequence)
        device.run()
        for sequence, (talk, prompt_len, is_cancelled) in batch.items():
            got = device.outputs[sequence]
            assert got == [token_at(sequence, prompt_len + i) for i in range(len(got))]
            if not is_cancelled:
                outputs.append(got)
                talk += got
    assert_all_returned(schedule)
    return outputs, schedule.counts.prefix_hit_tokens
